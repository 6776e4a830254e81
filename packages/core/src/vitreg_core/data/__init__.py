"""Images that models read: drawn scenes, folders of photos, and how to prepare them."""
