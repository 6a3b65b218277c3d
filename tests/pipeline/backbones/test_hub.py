"""Weights in the hub's cache, weights that cannot be downloaded, and hubs that answer wrongly."""

import json
import socket
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from huggingface_hub import constants

from features.errors import UserError
from pipeline.backbones import hub
from pipeline.backbones.listing import list_backbones
from pipeline.backbones.loading import load_backbone
from tests.pipeline.backbones.checkpoints import (
    bert_folder,
    open_clip_folder,
)


def test_weights_that_the_cache_holds_are_found_without_a_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / "models--google-bert--bert-base-uncased"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc")
    bert_folder(repository / "snapshots" / "abc")
    ours = load_backbone("bert", device="cpu")
    assert ours.name == "bert"
    assert load_backbone("hf:google-bert/bert-base-uncased", device="cpu").dim == 32
    rows = {row["name"]: row["offline"] for row in list_backbones()}
    assert rows["bert"]
    assert not rows["roberta"]


@pytest.mark.parametrize(
    "name", ["clip-vit-b-32", "bert", "hf:org/name", "open_clip:ViT-B-32/openai"]
)
def test_weights_that_cannot_be_had_are_one_line_and_quick(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with socket.socket() as silent:  # takes connections and never answers
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setattr(hub, "PATIENCE", 0.3)
        started = time.monotonic()
        with pytest.raises(UserError, match=r"does not answer; give a local folder$") as no:
            load_backbone(name)
        assert time.monotonic() - started < 5
    assert name in str(no.value)
    assert "\n" not in str(no.value)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        load_backbone(name)


@pytest.fixture
def odd_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type]:
    """A server in the hub's place, with an empty cache; it answers everything alike."""

    class Odd(BaseHTTPRequestHandler):
        status = 200
        asked = 0

        def answer(self) -> None:
            type(self).asked += 1
            body = b"" if self.command == "HEAD" else b"<html>Please log in"
            self.send_response(self.status)
            self.send_header("Location", self.path)  # a redirect to itself
            if self.status == 404:
                self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_HEAD = answer

        def log_message(self, *_: object) -> None:
            """Be quiet."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Odd) as server:
        Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        yield Odd
        server.shutdown()


@pytest.mark.parametrize("name", ["clip-vit-b-32", "bert", "open_clip:ViT-B-32/openai"])
@pytest.mark.parametrize(
    ("status", "message"),
    [
        (200, "answers, but not as a hub does"),
        (302, "does not answer"),
        (404, "has no such repository that is open to you"),
        (500, "answers with the status 500"),
    ],
)
def test_a_hub_that_answers_wrongly_is_one_line_and_quick(
    odd_hub: Any, name: str, status: int, message: str
) -> None:
    odd_hub.status = status
    started = time.monotonic()
    with pytest.raises(UserError, match=f"{message}; give a local folder") as no:
        load_backbone(name)
    assert time.monotonic() - started < 5
    assert "\n" not in str(no.value)


def test_a_text_tower_of_the_hub_is_not_waited_for(odd_hub: Any, tmp_path: Path) -> None:
    odd_hub.status = 500
    folder = open_clip_folder(tmp_path / "clip")
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["model_cfg"]["text_cfg"] = {"hf_model_name": "org/bert"}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    started = time.monotonic()
    with pytest.raises(UserError, match="open_clip cannot load"):
        load_backbone(str(folder), device="cpu")
    assert time.monotonic() - started < 5
    assert odd_hub.asked == 1
    assert not constants.is_offline_mode()
