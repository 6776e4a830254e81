"""Zero-shot classification against open_clip's own builder, scikit-learn and encoders whose answers are known."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import open_clip
import pytest
import torch
from PIL import Image
from sklearn.metrics import recall_score, top_k_accuracy_score
from torch import nn
from vitreg_core import VisionTransformer, ViTConfig, save_model
from vitreg_core.clip import ClipConfig, DualEncoder, TextConfig, clip_vision
from vitreg_core.config import PreprocessConfig
from vitreg_core.data.images import Preprocess
from vitreg_core.errors import InputError
from vitreg_core.weights.files import weights_hash, write_folder
from vitreg_eval import dual, prompts, texts
from vitreg_eval.cli import main
from vitreg_eval.datasets.imagenet import TEN
from vitreg_eval.dual import Dual, open_model
from vitreg_eval.prompts import Names, class_names, templates
from vitreg_eval.results import Result, read_result
from vitreg_eval.tasks import zeroshot
from vitreg_eval.texts import class_features, text_features

COLOURS = {"red": (250, 0, 0), "green": (0, 250, 0), "blue": (0, 0, 250), "yellow_ish": (250, 250, 0)}
VISION = {"layers": 1, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 16}
TEXT = {"context_length": 32, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2}
POOLED = VISION | {"attentional_pool": True, "attn_pooler_heads": 2}
PIXELS = {"size": [16, 16], "mean": [0.5] * 3, "std": [0.4] * 3, "interpolation": "bicubic", "resize_mode": "shortest"}


class Planted(nn.Module):
    """Places an image at its mean colour, and a text at the colour that it names."""

    def __init__(self) -> None:
        super().__init__()
        self.colours = nn.Parameter(torch.tensor([*COLOURS.values(), (1, 1, 1)]) / 250)

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        return images.mean(dim=(2, 3))

    def encode_text(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.colours[tokens[:, 0]]


def tokenize(lines: list[str]) -> torch.Tensor:
    """The number of the colour that a text names; one more where it names none."""
    known = [name.replace("_", " ") for name in COLOURS]
    return torch.tensor([[next((n for n, name in enumerate(known) if name in line), len(known))] for line in lines])


def planted(source: str = "planted") -> Dual:
    found = Dual(
        Planted(), Preprocess(PreprocessConfig(image_size=16, mean=(0.0,) * 3, std=(1.0,) * 3)), tokenize
    ).eval()
    found.source = source
    return found


def paint(folder: Path, name: str, colour: tuple[int, int, int]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (16, 16), colour).save(folder / f"{name}.png")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Three images of each class, of which one of `red` is green."""
    for name, colour in COLOURS.items():
        for number in range(3):
            paint(tmp_path / "photos" / "val" / name, str(number), colour)
    paint(tmp_path / "photos" / "val" / "red", "2", COLOURS["green"])
    return tmp_path / "photos"


@pytest.fixture
def of_planted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The command line opens the encoder whose answers are known."""
    monkeypatch.setattr(dual, "open_model", planted)
    yield


def their_model(vision: dict = VISION, text: dict = TEXT) -> open_clip.CLIP:
    torch.manual_seed(3)
    kind = open_clip.CLIP if text is TEXT else open_clip.CustomTextCLIP
    return kind(24, vision, text).eval()


def their_folder(folder: Path, vision: dict = VISION, text: dict = TEXT, pixels: dict = PIXELS) -> open_clip.CLIP:
    theirs = their_model(vision, text)
    model = {"embed_dim": 24, "vision_cfg": vision, "text_cfg": text, "custom_text": text is not TEXT}
    config = {"model_cfg": model, "preprocess_cfg": pixels}
    tensors = {name: value.clone() for name, value in theirs.state_dict().items()}
    write_folder(tensors, config, folder, ("open_clip_model.safetensors", "open_clip_config.json"))
    return theirs


def our_folder(folder: Path, registers: int = 0) -> DualEncoder:
    torch.manual_seed(5)
    vision = clip_vision(
        image_size=16, patch_size=8, embed_dim=64, depth=1, num_heads=1, num_classes=24, registers=registers
    )
    model = DualEncoder(ClipConfig(vision=vision, text=TextConfig(width=64, heads=1, layers=1, context_length=32)))
    model.eval().export(folder)
    return model


def run(line: str, out: Path) -> Result:
    main([*line.split(), "--out", str(out), "--device", "cpu"])
    return read_result(out)


def test_the_classifier_is_open_clips_own() -> None:
    theirs, tokenizer = their_model(), open_clip.SimpleTokenizer(context_length=32)
    ours = Dual(theirs, planted().preprocess, tokenizer)
    names = open_clip.IMAGENET_CLASSNAMES[:7]
    expected = open_clip.build_zero_shot_classifier(theirs, tokenizer, names, open_clip.OPENAI_IMAGENET_TEMPLATES)
    found = class_features(ours, names, templates(None, scenes=False))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.T, expected, rtol=0, atol=1e-6)
    images = torch.randn(5, 3, 16, 16)
    with torch.no_grad():
        scores = theirs.encode_image(images, normalize=True) @ expected
        mine = zeroshot.similarities(ours.features(images).cls, found)
    torch.testing.assert_close(mine, scores, rtol=0, atol=1e-6)


@pytest.mark.parametrize("most", [1, 5, 512])
def test_batches_of_texts_do_not_matter(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = Dual(their_model(), planted().preprocess, open_clip.SimpleTokenizer(context_length=32))
    names, lines = ["cat", "dog", "old bus"], ["a {}.", "the {} there", "{}"]
    whole = class_features(ours, names, lines)
    monkeypatch.setattr(texts, "TEXTS", most)
    torch.testing.assert_close(class_features(ours, names, lines), whole, rtol=0, atol=1e-6)


def test_the_80_templates_and_their_order() -> None:
    found = templates(None, scenes=False)
    assert len(found) == 80
    assert [line.replace("{}", "cat") for line in found] == [one("cat") for one in open_clip.OPENAI_IMAGENET_TEMPLATES]


def test_a_planted_encoder_gets_the_known_scores(photos: Path, of_planted: None, tmp_path: Path) -> None:
    found = run(f"zeroshot --model x --data {photos}", tmp_path / "out")
    assert found.metrics["top1"].value == 11 / 12
    assert found.metrics["mean_class_recall"].value == pytest.approx((2 / 3 + 3) / 4)
    assert set(found.metrics) == {"top1", "mean_class_recall"}
    assert (found.data.name, found.data.split, found.data.n) == ("photos", "val", 12)
    assert found.model.hash == weights_hash(planted())
    assert any("4 class names in 80 prompts each" in note and "chance is 0.25" in note for note in found.notes)


def test_class_folders_alone_will_do(photos: Path, of_planted: None, tmp_path: Path) -> None:
    found = run(f"zeroshot --model x --data {photos / 'val'}", tmp_path / "out")
    assert (found.metrics["top1"].value, found.data.name) == (11 / 12, "val")


def test_a_users_names_and_templates_are_read(photos: Path, of_planted: None, tmp_path: Path) -> None:
    names, lines = tmp_path / "names.txt", tmp_path / "templates.txt"
    names.write_text("red\tgreen\ngreen\tred\r\n\nblue\tblue\nyellow_ish\tyellow ish\nnowhere\twhite\n")
    lines.write_text("\ufeff{}, a colour\n", encoding="utf-8")
    found = run(f"zeroshot --model x --data {photos} --classes {names} --templates {lines}", tmp_path / "out")
    assert found.metrics["top1"].value == 7 / 12
    assert found.metrics["mean_class_recall"].value == pytest.approx((1 / 3 + 0 + 1 + 1) / 4)
    assert any("5 class names in 1 prompts" in note and "1 of them of classes that" in note for note in found.notes)


def test_scores_are_those_of_scikit_learn() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(80, 9, generator=generator)
    labels = torch.randint(0, 7, (80,), generator=generator) % 5 + 2
    found = zeroshot.evaluate(scores, labels - 2, Names(("a",) * 9, (2, 3, 4, 5, 6)), 0)
    assert found["top5"].value == pytest.approx(top_k_accuracy_score(labels, scores, k=5, labels=range(9)))
    assert found["top1"].value == pytest.approx(top_k_accuracy_score(labels, scores, k=1, labels=range(9)))
    recall = recall_score(labels, scores.argmax(1), labels=range(2, 7), average="macro", zero_division=0)
    assert found["mean_class_recall"].value == pytest.approx(recall)
    assert found["mean_class_recall"].ci95 is not None


def test_pictures_of_several_classes_are_scored_by_precision() -> None:
    rows = torch.tensor([[1, 0], [0, 1], [1, 1]])
    found = zeroshot.evaluate(torch.eye(3), rows, Names(("a", "b", "c"), (0, 1)), 0)
    assert list(found) == ["map"]


def test_scenes_are_named_by_texture(tmp_path: Path) -> None:
    our_folder(tmp_path / "model", registers=2)
    found = run(f"zeroshot --model {tmp_path / 'model'} --test_images 40", tmp_path / "out")
    assert set(found.metrics) == {"top1", "top5", "mean_class_recall"}
    assert found.metrics["top1"].n == 40
    assert any("6 class names in 8 prompts" in note for note in found.notes)
    assert "a {} disc alone on a smooth background" in prompts.SCENE_TEMPLATES


def test_the_paper_table_opens_dual_encoders(photos: Path, of_planted: None, tmp_path: Path) -> None:
    for wnid, name in zip(("n01440764", "n01443537"), ("red", "green"), strict=True):
        shutil.copytree(photos / "val" / name, tmp_path / "data" / "imagenet-1k" / "val" / wnid)
        shutil.copytree(photos / "val" / name, tmp_path / "data" / "imagenet-1k" / "train" / wnid)
    line = f"paper table2b --model x --data {tmp_path / 'data'} --device cpu --out {tmp_path / 'out'}"
    for _ in range(2):
        main(line.split())
    table = (tmp_path / "out" / "table.md").read_text()
    assert "| x | 0.5 (" in table  # neither name is a colour, so that all are called by the first
    assert "0.601" in table


# Names of classes


def test_wnids_have_open_clips_names() -> None:
    found = class_names(sorted(TEN))
    assert found.names[:3] == ("tench", "English Springer Spaniel", "cassette player")
    assert found.notes == ()


def test_the_1000_classes_have_998_names() -> None:
    from timm.data import ImageNetInfo

    found = class_names(ImageNetInfo().label_names())
    assert list(found.names) == list(open_clip.IMAGENET_CLASSNAMES)
    assert len(set(found.names)) == 998
    assert "missile, sunglasses" in found.notes[0]


@pytest.mark.real_data
def test_wnids_are_in_the_official_order(shared_data: Path) -> None:
    rows = [line.split("\t") for line in (shared_data / "imagenet-sample" / "classes.txt").read_text().splitlines()]
    assert class_names([wnid for _, wnid, _ in rows]).names == tuple(open_clip.IMAGENET_CLASSNAMES)
    with pytest.raises(
        InputError, match=r"classes\.txt: lines 265 and 475 are both 'cardigan'; give every class a name"
    ):
        class_names(["n01440764"], shared_data / "imagenet-sample" / "classes.txt")


def test_folders_are_names() -> None:
    assert class_names(["001.Black_footed_Albatross", "apple_pie"]).names == ("Black footed Albatross", "apple pie")
    assert "the class folders are numbers" in class_names(["1", "2"]).notes[0]


WRONG_NAMES = {
    "duplicates": ("cat\ndog\n\nCat \n", "lines 1 and 4 are both 'Cat'; give every class a name of its own"),
    "count": ("cat\ndog\nbird\nfish", "4 names for 3 classes (a to c); give one line for each"),
    "mixed": ("a\tcat\ndog\nc\tbird", "line 2 'dog' is not folder, tab, name, as others are"),
    "no name": ("a\tcat\nb\t\nc\tbird", "line 2 'b' is not folder, tab, name, as others are"),
    "folder twice": ("a\tcat\nb\tdog\na\tbird", "lines 1 and 3 are both 'a'; name every folder once"),
    "folder missing": ("a\tcat\nb\tdog\n", "no line for the class folder 'c'; add folder, tab, name"),
    "empty": ("\n \n", "empty; give a text file with a class name on each line"),
}


@pytest.mark.parametrize("case", WRONG_NAMES)
def test_wrong_names_are_refused(case: str, tmp_path: Path) -> None:
    content, advice = WRONG_NAMES[case]
    (tmp_path / "names.txt").write_text(content)
    with pytest.raises(InputError) as found:
        class_names(["a", "b", "c"], tmp_path / "names.txt")
    assert advice in str(found.value)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize("folders", [["big_cat", "big cat"], ["1.dog", "2.Dog"]])
def test_folders_of_the_same_name_are_refused(folders: list[str]) -> None:
    with pytest.raises(InputError, match=r"are both .*give --classes FILE with other names"):
        class_names(folders)


def test_unknown_wnids_are_refused() -> None:
    with pytest.raises(InputError, match="n99999999 is no class of ImageNet-1k; give --classes FILE"):
        class_names(["n01440764", "n99999999"])


# The text features on the disk


def test_texts_are_computed_once(
    photos: Path, of_planted: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = f"zeroshot --model x --data {photos} --cache {tmp_path / 'cache'}"
    first = run(line, tmp_path / "one")
    with monkeypatch.context() as patch:
        patch.setattr(texts, "embed", lambda *_: pytest.fail("computed again"))
        assert run(line, tmp_path / "two").metrics == first.metrics
    file = next((tmp_path / "cache").glob("texts-*.safetensors"))
    file.write_bytes(b"damaged")
    assert run(line, tmp_path / "three").metrics == first.metrics
    assert file.read_bytes() != b"damaged"


def test_other_texts_or_weights_are_others(tmp_path: Path) -> None:
    one, other = planted(), planted()
    with torch.no_grad():
        other.model.colours.add_(0.1)
    text_features(one, ["red", "blue"], tmp_path)
    for model, lines in ((other, ["red", "blue"]), (one, ["blue", "red"])):
        torch.testing.assert_close(text_features(model, lines, tmp_path), model.encode_text(lines))
    for names, lines in ((["red", "blue"], ["{}"]), (["green", "blue"], ["{}"]), (["red", "blue"], ["{} {}", "{}"])):
        torch.testing.assert_close(class_features(one, names, lines, tmp_path), class_features(one, names, lines))
    assert len(list(tmp_path.iterdir())) == 6


def test_texts_that_are_no_numbers_are_refused() -> None:
    broken = planted()
    with torch.no_grad():
        broken.model.colours[0] = torch.nan
    with pytest.raises(InputError, match="features of 'red' are not finite numbers; check its weights"):
        text_features(broken, ["red"])


# Models


@pytest.mark.parametrize("registers", [0, 4])
def test_our_dual_encoder_is_opened(registers: int, tmp_path: Path) -> None:
    model = our_folder(tmp_path, registers)
    found = open_model(str(tmp_path))
    images = torch.randn(2, 3, 16, 16)
    tokens = open_clip.tokenize(["a cat", "two dogs"], context_length=32)
    with torch.no_grad():
        torch.testing.assert_close(found.features(images).cls, model.encode_image(images), rtol=0, atol=1e-5)
        expected = model.encode_text(tokens, normalize=True)
    torch.testing.assert_close(found.encode_text(["a cat", "two dogs"]), expected, rtol=0, atol=1e-5)
    assert isinstance(found.model, DualEncoder)
    assert (found.source, found.embed_dim, found.training) == (str(tmp_path), 24, False)


FOREIGN = {
    "image tower": (POOLED, TEXT),
    "text tower": (VISION, TEXT | {"no_causal_mask": True, "pool_type": "last"}),
    "both": (POOLED, TEXT | {"pool_type": "first"}),
}


@pytest.mark.parametrize("case", FOREIGN)
@pytest.mark.parametrize("resize", ["shortest", "squash"])
def test_what_ours_cannot_hold_runs_in_open_clips_class(case: str, resize: str, tmp_path: Path) -> None:
    theirs = their_folder(tmp_path, *FOREIGN[case], PIXELS | {"resize_mode": resize})
    found = open_model(str(tmp_path))
    assert not isinstance(found.model, DualEncoder)
    images = torch.randn(2, 3, 16, 16)
    tokens = open_clip.tokenize(["a cat", "two dogs"], context_length=32)
    with torch.no_grad():
        torch.testing.assert_close(found.features(images).cls, theirs.encode_image(images))
        torch.testing.assert_close(found.encode_text(["a cat", "two dogs"]), theirs.encode_text(tokens, normalize=True))
    photo = Image.effect_noise((40, 24), 80).convert("RGB")
    prepare = open_clip.create_model_and_transforms(f"local-dir:{tmp_path}")[2]
    torch.testing.assert_close(found.preprocess(photo), prepare(photo), rtol=0, atol=1e-6)


def test_weights_in_the_names_of_another_library_are_passed_over(tmp_path: Path) -> None:
    our_folder(tmp_path)
    shutil.copy(tmp_path / "open_clip_model.safetensors", tmp_path / "kept")
    write_folder({"text_model.x": torch.zeros(1)}, {"model_type": "clip"}, tmp_path)
    assert open_model(str(tmp_path)).embed_dim == 24


def test_tokens_of_a_dual_encoder_are_not_shown() -> None:
    with pytest.raises(InputError, match="to see tokens, open its image tower alone"):
        planted().attention(torch.zeros(1, 3, 16, 16), 0)


def test_long_texts_are_counted(tmp_path: Path) -> None:
    our_folder(tmp_path)
    found = open_model(str(tmp_path))
    assert found.too_long(["cat " * 30, "cat " * 31, "cat"]) == 1
    assert planted().too_long(["cat " * 300]) == 0


# Bad input

BAD = {
    "no model": ("zeroshot", "missing: --model SOURCE, a dual encoder"),
    "preset": ("zeroshot --model vit_s16_reg4", "vit_s16_reg4: a preset has no text tower; give a dual encoder"),
    "nowhere": ("zeroshot --model nowhere", "model source 'nowhere': no such file or folder"),
    "no text tower": ("zeroshot --model {vit}", "give a dual encoder"),
    "registers": ("zeroshot --model {model} --registers 0,4", "measured with all of its registers; leave it out"),
    "data": ("zeroshot --model {model} --data {empty}/none", "no such folder; give --data an existing one"),
    "no classes": ("zeroshot --model {model} --data {empty}", "0 class folders found"),
    "dataset": ("zeroshot --model {model} --data {empty} --dataset cifar11", "did you mean cifar10"),
    "no names": ("zeroshot --model {model} --classes {empty}/none", "give a text file with a class name on each line"),
    "folder": ("zeroshot --model {model} --templates {empty}", "cannot be read (Is a directory); give a text file"),
    "no place": (
        "zeroshot --model {model} --templates {plain}",
        "line 2 'a photo' has 0 places {} for the name of the class; give one, as in 'a photo of a {}.'",
    ),
    "two places": ("zeroshot --model {model} --templates {twice}", "line 1 '{} and {}' has 2 places {}"),
    "empty": ("zeroshot --model {model} --templates {nothing}", "nothing.txt: empty; give a text file with a prompt"),
    "bytes": ("zeroshot --model {model} --templates {latin}", "latin.txt: not UTF-8 (byte 1); save it as UTF-8 text"),
    "duplicates": ("zeroshot --model {model} --classes {twins}", "lines 1 and 6 are both 'Plain'; give every class"),
    "cache": ("zeroshot --model {model} --cache {nothing} --test_images 2", "cannot be written"),
    "damaged": ("zeroshot --model {damaged}", "not valid JSON"),
    "config": ("zeroshot --model {listed}", "model_cfg is no object of names and values; write it again"),
    "vocabulary": ("zeroshot --model {small}", "open_clip's tokenizer"),
}


@pytest.fixture
def places(tmp_path: Path) -> dict[str, str]:
    """Names of files and folders of which something is wrong, and a good model."""
    our_folder(tmp_path / "model")
    save_model(
        VisionTransformer(ViTConfig(image_size=32, patch_size=8, embed_dim=24, depth=1, num_heads=3, num_classes=5)),
        tmp_path / "vit",
    )
    (tmp_path / "empty").mkdir()
    contents = {
        "plain": b"a {}\na photo\n",
        "twice": b"{} and {}\n",
        "nothing": b"",
        "latin": "a\xe9 {}".encode("latin-1"),
        "twins": b"plain\nstriped\nchecked\ndotted\nringed\nPlain\n",
    }
    for name, content in contents.items():
        (tmp_path / f"{name}.txt").write_bytes(content)
    for name, config in (("damaged", "{"), ("listed", json.dumps({"model_cfg": [1]}))):
        shutil.copytree(tmp_path / "model", tmp_path / name)
        (tmp_path / name / "open_clip_config.json").write_text(config)
    their_folder(tmp_path / "small", text=TEXT | {"vocab_size": 100})
    files = {name: str(tmp_path / f"{name}.txt") for name in contents}
    return files | {name: str(tmp_path / name) for name in ("model", "vit", "empty", "damaged", "listed", "small")}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_ends_with_one_line_and_code_2(
    case: str, places: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line, advice = BAD[case]
    with pytest.raises(SystemExit) as ended:
        run(line.format(**places), tmp_path / "out")
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    assert advice in error
    assert not (tmp_path / "out" / "result.json").exists()
