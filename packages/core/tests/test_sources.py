import hashlib
import importlib.util
import json
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar
from unittest.mock import MagicMock

import huggingface_hub
import pytest
import timm
from vitreg_core import VisionTransformer, ViTConfig, save_model
from vitreg_core.errors import InputError
from vitreg_core.weights import sources
from vitreg_core.weights.download import cache_folder, download
from vitreg_core.weights.official import OFFICIAL
from vitreg_core.weights.sources import from_hub, locate

CONFIG = ViTConfig(image_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3, registers=2)


class Handler(BaseHTTPRequestHandler):
    """Serves files from memory as a file server and, below org/name/resolve/main, as the Hugging Face hub does."""

    files: ClassVar[dict[str, bytes]] = {}
    asked: ClassVar[list[str]] = []
    announced = 0
    """Bytes announced beyond those sent."""

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.wfile.write(self.answer())

    def answer(self) -> bytes:
        self.asked.append(self.path)
        body = self.files.get(self.path)
        self.send_response(404 if body is None else 200)
        if body is None:
            known = any(path.startswith("/".join(self.path.split("/")[:3])) for path in self.files)
            self.send_header("X-Error-Code", "EntryNotFound" if known else "RepoNotFound")
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("ETag", f'"{hashlib.sha256(body or b"").hexdigest()}"')
        self.send_header("Content-Length", str(len(body or b"") + self.announced))
        self.end_headers()
        return body or b""

    def log_message(self, *arguments: object) -> None:
        """Keep stderr clean."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[ThreadingHTTPServer]:
    """A server on this machine, standing in for the hub as well; caches lie in the test's folder."""
    monkeypatch.setattr(Handler, "files", {})
    monkeypatch.setattr(Handler, "asked", [])
    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    template = address(running, "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address(running, ""))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("VITREG_CACHE", str(tmp_path / "cache"))
    yield running
    stop(running)
    thread.join()


def stop(server: ThreadingHTTPServer) -> None:
    server.shutdown()
    server.server_close()


def address(server: ThreadingHTTPServer, path: str) -> str:
    return f"http://127.0.0.1:{server.server_port}{path}"


def publish(folder: Path, repository: str, names: dict[str, str]) -> None:
    """Put a saved model on the server, under other file names."""
    save_model(VisionTransformer(CONFIG), folder)
    for own, name in names.items():
        Handler.files[f"/{repository}/resolve/main/{name}"] = (folder / own).read_bytes()


def test_a_repository_of_the_hub_is_fetched_once(server: ThreadingHTTPServer, tmp_path: Path) -> None:
    publish(tmp_path / "model", "me/vit", {"model.safetensors": "model.safetensors", "config.json": "config.json"})
    file = locate("hub:me/vit")
    assert file.read_bytes() == (tmp_path / "model" / "model.safetensors").read_bytes()
    assert json.loads((file.parent / "config.json").read_text())["library"] == "vitreg"
    Handler.asked.clear()
    assert locate("transformers:me/vit@main") == file
    assert [path for path in Handler.asked if path.endswith("model.safetensors")] == [
        "/me/vit/resolve/main/model.safetensors"
    ]


def test_the_best_weights_of_a_repository_are_taken(server: ThreadingHTTPServer, tmp_path: Path) -> None:
    publish(tmp_path / "model", "me/clip", {"model.safetensors": "open_clip_pytorch_model.bin"})
    assert locate("hub:me/clip").name == "open_clip_pytorch_model.bin"
    Handler.files["/me/clip/resolve/main/model.safetensors"] = b"image tower"
    assert locate("hub:me/clip").name == "model.safetensors"
    assert from_hub("me/clip", sources.TOWERS).name == "open_clip_pytorch_model.bin"


def test_a_repository_in_the_cache_needs_no_network(
    server: ThreadingHTTPServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(tmp_path / "model", "me/vit", {"model.safetensors": "pytorch_model.bin", "config.json": "config.json"})
    file = locate("hub:me/vit")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert locate("hub:me/vit") == file


def test_without_network_one_line_says_which_file_to_put_where(
    server: ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        InputError,
        match=r"hub:me/vit: out of reach and not in the cache; put model.safetensors or .* from "
        r"https://huggingface.co/me/vit into a folder, with config.json beside it, and give the folder",
    ) as error:
        locate("hub:me/vit")
    assert "\n" not in str(error.value)
    assert Handler.asked == []


@pytest.mark.parametrize(
    ("source", "advice"),
    [
        ("hub:me/nothing", "hub:me/nothing: no such repository; give org/name, if private after: hf auth login"),
        ("hub:me/code", "holds no weights that can be read .*; give another repository"),
        ("hub:not a name", "hub:not a name: cannot be fetched .*; try again"),
    ],
)
def test_repositories_that_cannot_be_used_are_named(server: ThreadingHTTPServer, source: str, advice: str) -> None:
    Handler.files["/me/code/resolve/main/README.md"] = b""
    with pytest.raises(InputError, match=advice) as error:
        locate(source)
    assert "\n" not in str(error.value)


def test_a_gated_repository_says_how_to_get_in(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **options: object) -> str:
        raise huggingface_hub.errors.GatedRepoError("403", response=MagicMock(headers={}))

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    with pytest.raises(InputError, match=r"accept its terms at https://huggingface.co/a/b and run: hf auth login"):
        locate("hub:a/b")


@pytest.fixture
def repositories(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, tuple[str, ...]]]:
    """What would be asked of the hub."""
    asked: list[tuple[str, tuple[str, ...]]] = []

    def fetch(name: str, weights: tuple[str, ...] = sources.WEIGHTS) -> Path:
        asked.append((name, tuple(weights)))
        return Path(name)

    monkeypatch.setattr(sources, "from_hub", fetch)
    return asked


def test_names_of_timm_lead_to_timms_repositories(repositories: list) -> None:
    for name in ("vit_base_patch16_224", "vit_small_patch14_reg4_dinov2.lvd142m"):
        locate(f"timm:{name}")
    wanted = [timm.create_model("vit_base_patch16_224", num_classes=0).pretrained_cfg["hf_hub_id"]]
    assert [name for name, _ in repositories] == [*wanted, "timm/vit_small_patch14_reg4_dinov2.lvd142m"]


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("vit_base_patch16_225", r"did you mean vit_base_patch16_22"),
        ("vit_base_patch16_224.augreg_in1", "did you mean vit_base_patch16_224.augreg_in1k"),
    ],
)
def test_unknown_names_of_timm_get_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(InputError, match=nearest):
        locate(f"timm:{name}")


def test_without_timm_a_name_needs_its_tag(repositories: list, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "timm" else find(name))
    monkeypatch.setitem(sys.modules, "timm", None)
    assert locate("timm:vit_x.y") == Path("timm/vit_x.y")
    with pytest.raises(InputError, match=r"timm:vit_x without a tag needs timm; .*pip install 'vitreg-core\[timm\]'"):
        locate("timm:vit_x")


def test_architectures_of_open_clip_lead_to_its_weights(repositories: list) -> None:
    locate("open_clip:ViT-B-16/openai")
    locate("open_clip:ViT-B-16/laion2b_s34b_b88k")
    assert repositories == [
        ("timm/vit_base_patch16_clip_224.openai", sources.TOWERS),
        ("laion/CLIP-ViT-B-16-laion2B-s34B-b88K", sources.TOWERS),
    ]


def test_open_clip_weights_outside_the_hub_get_their_config(
    server: ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    Handler.files["/vit.pt"] = b"weights"
    config = {"url": address(server, "/vit.pt"), "hf_hub": "", "mean": (0.1, 0.2, 0.3), "quick_gelu": True}
    monkeypatch.setitem(sys.modules["open_clip.pretrained"]._PRETRAINED["ViT-B-16"], "mine", config)
    file = locate("open_clip:ViT-B-16/mine")
    beside = json.loads((file.parent / "open_clip_config.json").read_text())
    assert (file.read_bytes(), beside["preprocess_cfg"]) == (b"weights", {"mean": [0.1, 0.2, 0.3]})
    assert (beside["model_cfg"]["vision_cfg"]["patch_size"], beside["model_cfg"]["quick_gelu"]) == (16, True)


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("ViT-B-17/openai", "no weights for ViT-B-17; did you mean ViT-B-1?6?.*; give ARCH/TAG"),
        ("ViT-B-16/open", "no tag 'open'; did you mean openai.; give open_clip:ViT-B-16/TAG with TAG one of openai, "),
        ("ViT-B-16", "no tag ''; give open_clip:ViT-B-16/TAG"),
    ],
)
def test_unknown_names_of_open_clip_get_the_nearest(name: str, advice: str) -> None:
    with pytest.raises(InputError, match=advice):
        locate(f"open_clip:{name}")


@pytest.mark.parametrize(
    ("source", "module", "extra"),
    [("hub:a/b", "huggingface_hub", "hub"), ("open_clip:ViT-B-16", "open_clip", "open-clip")],
)
def test_missing_extras_are_named(monkeypatch: pytest.MonkeyPatch, source: str, module: str, extra: str) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(InputError, match=rf"needs {module}; install it with: pip install 'vitreg-core\[{extra}\]'"):
        locate(source)


def test_official_addresses_are_those_that_timm_knows() -> None:
    theirs = {config.url for name in timm.list_models("*vit*") for config in configs(name)}
    theirs |= {config.url for name in timm.list_models("deit3*") for config in configs(name)}
    ours = set(OFFICIAL.values())
    assert not ours - theirs
    kinds = ("/dino/dino_deit", "/dino/dino_vit", "/dinov2/", "/mae/", "/deit_3_")
    assert {url for url in theirs if url and any(kind in url for kind in kinds)} == ours


def configs(name: str) -> list:
    return list(timm.models.get_arch_pretrained_cfgs(name).values())


def test_both_spellings_of_dinov2_with_registers_are_known() -> None:
    assert OFFICIAL["dinov2_vitb14_reg"] == OFFICIAL["dinov2_vitb14_reg4"] != OFFICIAL["dinov2_vitb14"]


def test_an_official_file_is_fetched_once_and_checked_at_every_use(
    server: ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    Handler.files["/mae.pth"] = b"weights"
    monkeypatch.setitem(OFFICIAL, "mae_pretrain_vit_base", address(server, "/mae.pth"))
    file = locate("mae_pretrain_vit_base")
    assert (file, file.read_bytes()) == (cache_folder() / "mae.pth", b"weights")
    assert (file.parent / "mae.pth.sha256").read_text().strip() == hashlib.sha256(b"weights").hexdigest()
    assert locate("mae_pretrain_vit_base") == file
    assert Handler.asked == ["/mae.pth"]
    assert capfd.readouterr().err == ""  # the bar is for terminals
    file.write_bytes(b"weighed")
    with pytest.raises(InputError, match=r"mae.pth: remove it and fetch it again; it changed since then"):
        locate("mae_pretrain_vit_base")


def cut_short(handler: type[Handler], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handler, "announced", 3)


def nothing(handler: type[Handler], monkeypatch: pytest.MonkeyPatch) -> None:
    handler.files.clear()


def untouched(handler: type[Handler], monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the server as it is: the name of the file gives a hash that its content does not have."""


@pytest.mark.parametrize(
    ("damage", "advice"),
    [
        (cut_short, "vit-0123abcd.pth: 7 of 10 bytes came; nothing was kept, try again"),
        (nothing, r"cannot fetch http.*/vit-0123abcd.pth \(HTTP Error 404.*\); get that file another way and put it"),
        (untouched, "vit-0123abcd.pth: nothing was kept, try again; its SHA-256 .* does not begin with 0123abcd"),
    ],
)
def test_a_download_that_fails_leaves_nothing_behind(
    server: ThreadingHTTPServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    damage: Callable[[type[Handler], pytest.MonkeyPatch], None],
    advice: str,
) -> None:
    Handler.files["/vit-0123abcd.pth"] = b"weights"
    damage(Handler, monkeypatch)
    with pytest.raises(InputError, match=advice) as error:
        download(address(server, "/vit-0123abcd.pth"), tmp_path / "new")
    assert "\n" not in str(error.value)
    assert list((tmp_path / "new").iterdir()) == []


def test_the_hash_in_a_name_is_checked_for_files_put_there_by_hand(tmp_path: Path) -> None:
    digest = hashlib.sha256(b"weights").hexdigest()[:8]
    (tmp_path / f"vit-{digest}.pth").write_bytes(b"weights")
    assert download(f"http://nowhere.invalid/vit-{digest}.pth", tmp_path).read_bytes() == b"weights"
    (tmp_path / f"vit-{digest}.pth").write_bytes(b"other")
    with pytest.raises(InputError, match="remove it and fetch it again; its SHA-256"):
        download(f"http://nowhere.invalid/vit-{digest}.pth", tmp_path)


def test_an_official_file_out_of_reach_says_where_to_put_it(
    server: ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(OFFICIAL, "dino_vits16", "http://127.0.0.1:9/dino.pth")
    with pytest.raises(InputError, match=r"cannot fetch http.*dino.pth .*put it at .*cache/dino.pth"):
        locate("dino_vits16")


@pytest.mark.parametrize(
    ("source", "advice"),
    [
        ("dinov2_vitb14_reg5", "did you mean dinov2_vitb14_reg"),
        ("tim:vit_tiny", "did you mean timm"),
        ("vit_s16_regs4", "did you mean vit_s16_reg4"),
        ("somewhere/else", r"give a folder with model.safetensors and config.json, hub:org/name, timm:NAME, "),
        ("hub:", "'hub:': no such file or folder"),
    ],
)
def test_unknown_sources_get_the_nearest(source: str, advice: str) -> None:
    with pytest.raises(InputError, match=advice):
        locate(source)


def test_files_and_folders_are_themselves(tmp_path: Path) -> None:
    assert locate(str(tmp_path)) == tmp_path
