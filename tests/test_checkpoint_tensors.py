"""Tensors of a checkpoint: those that do not fit the list are refused; folders that lost some are read or warned of."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

import ltepass
from ltepass.errors import CheckpointError
from ltepass.routed.routed import routers_of, state_of
from ltepass.routed.sites import FFNSite
from ltepass.saving.tensor_checks import check_shapes, shapes_of
from tests.crafted_checkpoints import CHECKPOINTS, IDS, copied, write
from tests.models import zoo


def test_a_folder_that_lost_its_prefix_by_halves_is_read() -> None:
    """The first version, saved again from AutoModel: `neurons` had lost the prefix, the other rows had not."""
    entry = json.loads((CHECKPOINTS / "v1/inline/config.json").read_text())["quantization_config"]
    want = [FFNSite.from_dict(site).renamed(lambda p: p.removeprefix("model.")) for site in entry["sites"]]
    for site in entry["sites"]:
        for key in ("name", "owner", "router", "up", "down"):
            site[key] = site[key].removeprefix("model.")
        for rows in site["neurons"]:
            rows["param"] = rows["param"].removeprefix("model.")
        assert site["up_rows"]["param"].startswith("model.")
        assert site["down_bias"].startswith("model.")
    assert [FFNSite.from_dict(site) for site in entry["sites"]] == want


def without_routers(folder: Path, which: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({n: t for n, t in tensors.items() if which not in n}, folder / "model.safetensors", {"format": "pt"})


def test_a_copy_saved_again_without_ltepass_is_dense_with_one_warning(tmp_path: Path) -> None:
    copied("v2/aligned", tmp_path)
    without_routers(tmp_path, ".router.")
    with pytest.warns(UserWarning, match="loaded dense") as caught:
        model = hf.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert len([w for w in caught if "ltepass" in str(w.message)]) == 1
    assert state_of(model) is None
    assert not any(routers_of(model))
    whole = hf.AutoModelForCausalLM.from_pretrained(CHECKPOINTS / "v2/aligned")
    ltepass.set_mode(whole, "dense")
    assert torch.equal(model(IDS).logits, whole(IDS).logits)
    assert model.half().dtype == torch.float16
    model.save_pretrained(tmp_path / "again")
    assert "quantization_config" not in json.loads((tmp_path / "again/config.json").read_text())


TENSORS = {
    "lack 1 of them": lambda t: [t.pop(n) for n in list(t) if "layers.1.mlp.router" in n],
    "quantiles in the weight files is missing": lambda t: t.pop("model.layers.0.mlp.router.quantiles"),
    "threshold in the weight files is missing": lambda t: [t.pop(n) for n in list(t) if n.endswith("threshold")],
    "lack 2 of them": lambda t: [t.pop(n) for n in list(t) if "router" in n and "router.weight" not in n],
    "other.quantiles in the weight files is F32": lambda t: t.update(
        {"model.layers.0.mlp.router.other.quantiles": torch.zeros(101)}
    ),
    "bias in the weight files is missing": lambda t: t.pop("model.layers.0.mlp.router.bias"),
    "F16": lambda t: t.update({n: v.half() for n, v in t.items() if n.endswith("router.weight")}),
    "cut in the weight files is F32": lambda t: t.update({"model.layers.0.mlp.router.cut": torch.zeros(())}),
    "I32": lambda t: t.update({n: v.int() for n, v in t.items() if "q_proj" in n}),
    "down_proj.weight is missing": lambda t: t.pop("model.layers.1.mlp.down_proj.weight"),
    "q_proj.weight is missing": lambda t: t.update(x=t.pop("model.layers.0.self_attn.q_proj.weight")),
    r"\[60, 25\]": lambda t: t.update({"model.layers.1.mlp.up_proj.weight": torch.zeros(60, 25)}),
    "permutation of site": lambda t: t["model.layers.0.mlp.router.permutation"].fill_(3),
    "threshold of site": lambda t: t["model.layers.1.mlp.router.threshold"].fill_(float("nan")),
    "table of site": lambda t: t["model.layers.1.mlp.router.quantiles"][5:9].fill_(float("nan")),
    "lack 1 of them .first: model.layers.1": lambda t: t.update(
        {n.replace("model.layers.1", "\x1b[31m.layers.1"): t.pop(n) for n in list(t) if "layers.1.mlp.router" in n}
    ),
    "does not list": lambda t: t.update({"model.layers.2.mlp.router.quantiles": torch.zeros(101)}),
}


@pytest.mark.parametrize("message", TENSORS)
def test_tensors_that_do_not_fit_the_list_are_refused(message: str, tmp_path: Path) -> None:
    copied("v2/aligned", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    TENSORS[message](tensors)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=message):
        hf.AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.filterwarnings("ignore:config.json lists routers")
@pytest.mark.parametrize("routers", [True, False])
def test_a_head_of_another_size_is_refused_by_every_version_of_transformers(routers: bool, tmp_path: Path) -> None:
    """5.17 would take it, so that the model and its config.json disagree."""
    config = copied("v2/aligned", tmp_path)
    config["vocab_size"] += 1
    write(tmp_path, config)
    if not routers:
        without_routers(tmp_path, "router")
    with pytest.raises((CheckpointError, RuntimeError)):
        hf.AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_loaded_weight_has_the_shape_of_its_class() -> None:
    model = zoo.llama(1)
    built = shapes_of(model)
    check_shapes(model, built)
    model.lm_head.weight = torch.nn.Parameter(torch.zeros(7, 24))
    with pytest.raises(CheckpointError, match=r"lm_head.weight in the weight files is \[7, 24\]; config.json asks for"):
        check_shapes(model, built)


def test_weights_in_a_pickle_are_refused(tmp_path: Path) -> None:
    copied("v2/aligned", tmp_path)
    torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no safetensors file"):
        hf.AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_part_that_was_transformed_alone_warns_where_the_whole_is_saved(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = zoo.llama(1).eval()
    ltepass.transform(model.model)
    with pytest.warns(UserWarning, match="model of this LlamaForCausalLM was transformed alone"):
        model.save_pretrained(tmp_path / "whole")
    ltepass.set_mode(model.model, "hard")
    want = model.model(IDS).last_hidden_state
    model.model.save_pretrained(tmp_path / "part")  # no warning here, which would be an error in these tests
    assert torch.equal(hf.AutoModel.from_pretrained(tmp_path / "part")(IDS).last_hidden_state, want)
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "part")
    assert torch.equal(again.model(IDS).last_hidden_state, want)
    ltepass.remove(model.model)
    assert not model.model._state_dict_pre_hooks
    model.save_pretrained(tmp_path / "dense")
