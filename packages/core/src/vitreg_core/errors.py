"""The one error a user can answer."""


class InputError(ValueError):
    """What the user gave cannot be used: an option, a file, a checkpoint, an image.

    The message is one line that names the offending value and says what to do. Programs print it and exit with 2.
    """
