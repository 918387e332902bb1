"""A checkpoint is data: what its strings, numbers and tensors say is believed only where the model agrees."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import nn
from torch.fx import Graph

import ltepass
from ltepass.errors import CheckpointError, SourceNameError
from ltepass.passes.capture.owner_forward import trace_owner
from ltepass.passes.insert.regenerated_forwards import ForwardCode
from ltepass.routed.sites import FFNSite, NeuronRows, Refusal, routers_of, state_of
from tests.models import zoo
from tests.typed import lte_state
from tests.watching import MARK, watch

CHECKPOINTS = Path(__file__).parent / "checkpoints"
IDS = torch.arange(3, 35).reshape(2, 16)
PAYLOADS = [
    f'x") or __import__("os").system("{MARK}") or ("',
    f"x\n        __import__('os').system('{MARK}')\n        self.y",
    f"x.__class__.__init__.__globals__.{MARK}",
    f"x)[__import__('os').system('{MARK}')](",
    f'up_proj") and getattr(__import__("os"), "system")("{MARK}") and ("',  # the one that ran: in the router's name
]
FIELDS = ["router", "owner", "up", "gate", "down", "name", "activation", "kind", "down_bias", "param"]


@pytest.fixture(scope="module", autouse=True)
def _imported() -> None:
    """A first load imports the rest of transformers, and torch then makes its cache folder."""
    hf.AutoModelForCausalLM.from_pretrained(CHECKPOINTS / "v2/aligned")


def copied(name: str, folder: Path) -> dict[str, Any]:
    """A fixture's copy, and its config."""
    for file in (CHECKPOINTS / name).iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return json.loads((folder / "config.json").read_text())  # type: ignore[no-any-return]


def write(folder: Path, config: dict[str, Any]) -> None:
    (folder / "config.json").write_text(json.dumps(config))


def craft(site: dict[str, Any], field: str, payload: str) -> None:
    """One field of a site becomes a payload, as a path that begins like the true one."""
    if field != "param":
        before = site[field] or "model"
        beside = before.rpartition(".")[0] if field == "router" and "." not in payload else before
        site[field] = f"{beside}.{payload}"
    elif "parameters" in site:
        site["parameters"][0] += f".{payload}"
    else:
        before = site["neurons"][0]["param"]
        for rows in (*site["neurons"], site["up_rows"], site["gate_rows"], site["down_rows"]):
            rows["param"] = rows["param"].replace(before, f"{before}.{payload}")


@pytest.mark.parametrize("payload", range(len(PAYLOADS)))
@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("version", ["v1", "v2"])
def test_no_string_of_a_checkpoint_runs(version: str, field: str, payload: int, tmp_path: Path) -> None:
    config = copied(f"{version}/aligned", tmp_path)
    craft(config["quantization_config"]["sites"][0], field, PAYLOADS[payload])
    write(tmp_path, config)
    with watch() as done, pytest.raises(CheckpointError):
        hf.AutoModelForCausalLM.from_pretrained(tmp_path)(input_ids=IDS)
    assert not done


def test_the_watch_sees_what_it_is_there_for(tmp_path: Path) -> None:
    with watch() as done:
        exec(compile(f"x = '{MARK}'", "payload", "exec"))
        (tmp_path / "written").write_text("x")
        subprocess.run([sys.executable, "-c", ""], check=True)
    assert {what.split()[0] for what in done} >= {"compile", "open", "subprocess.Popen"}


def graph_with(target: str) -> Graph:
    graph = Graph()
    graph.output(graph.create_node("call_module", target, (graph.placeholder("x"),)))
    return graph


@pytest.mark.parametrize("target", [*PAYLOADS, "a.class", "a..b", "", "a.__init__", 'a"', "a\\"])
def test_no_name_outside_the_rule_is_written_into_source(target: str) -> None:
    with pytest.raises(SourceNameError, match="rename the module"):
        ForwardCode.of(graph_with(target))


def test_names_of_every_kind_are_held_to_the_rule() -> None:
    targets: dict[str, Any] = {"get_attr": PAYLOADS[0], "call_method": PAYLOADS[0], "call_function": torch.relu}
    named: dict[str, Any] = {PAYLOADS[0]: 1}
    for op, target in targets.items():
        graph = Graph()
        x = graph.placeholder("x")
        graph.output(graph.create_node(op, target, (x,), named if op == "call_function" else {}))
        with pytest.raises(SourceNameError):
            ForwardCode.of(graph)
    assert "up-proj" in ForwardCode.of(graph_with("blocks.0.up-proj")).source


def test_the_rule_stands_under_python_o() -> None:
    code = (
        "from torch.fx import Graph\nfrom ltepass.passes.insert.regenerated_forwards import ForwardCode\ng = Graph()\n"
        "g.output(g.create_node('call_module', 'x\") or 1 or (\"', (g.placeholder('x'),)))\n"
        "try: ForwardCode.of(g)\nexcept ValueError as e: print(type(e).__name__)"
    )
    done = subprocess.run([sys.executable, "-O", "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "SourceNameError", done.stderr


class Odd(nn.Module):
    """An FFN whose linears have names that no source may hold."""

    def __init__(self) -> None:
        super().__init__()
        self.add_module('up"', nn.Linear(8, 16))
        self.down = nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> Any:
        return self.down(torch.relu(getattr(self, 'up"')(x)))


def test_an_owner_with_such_names_is_served_by_hooks() -> None:
    model = Odd().eval()
    assert trace_owner(model) is None
    x = torch.randn(2, 3, 8)
    want = model(x)
    ltepass.transform(model, (x,))
    assert lte_state(model).sites[0].kind == "inline"
    assert torch.equal(model(x), want)
    with pytest.raises(CheckpointError, match="up is"):  # and is not saved: no checkpoint may name them
        ltepass.save(model, "never-written")
    assert not Path("never-written").exists()


WRONG: dict[str, tuple[Any, ...]] = {
    "kind": ("hooks", "graph", None, 1, True),
    "activation": ("swish", "custom(" + PAYLOADS[0] + ")", "gelu", 7, None),
    "d_ff": (10**12, 10**40, -60, 0, 59, 60.0, "60", True, None),
    "d_model": (10**12, 23, True),
    "group_size": (0, 7, -5, 5.0, True, 10**12),
    "router": ("model.layers.0.router", "model.layers.0.mlp.up_proj", "model.layers.0.mlp.act_fn", "router", ""),
    "owner": ("model.layers.1.mlp", "model.layers.0", "", "model.layers.0.mlp.up_proj"),
    "up": ("model.layers.0.mlp.down_proj", "model.layers.1.mlp.up_proj", "lm_head", "model.layers.0.mlp", ""),
    "gate": (None, "model.layers.0.mlp.up_proj", "model.layers.0.mlp.act_fn"),
    "down": ("model.layers.1.mlp.down_proj", "model.layers.0.self_attn.o_proj"),
    "down_bias": ("model.layers.0.input_layernorm.weight", "model.norm.weight"),
    "name": ("model.layers.1.mlp", "other"),
    "nodes": (["x", "h", "down"], None),
    "up_rows": (1, 2, 3, -1, None, True),
    "gate_rows": (0, 2, None),
    "down_rows": (0, 1, None),
    "up_bias": (0,),
    "parameters": ([], ["lm_head.weight"] * 3, None),
    "neurons": ([], None, [{"parameter": 0, "dim": 0, "start": 0, "step": 1}]),
}


@pytest.mark.parametrize("field", WRONG)
def test_a_site_that_does_not_fit_the_model_is_refused(field: str, tmp_path: Path) -> None:
    config = copied("v2/aligned", tmp_path)
    for value in WRONG[field]:
        changed = copy.deepcopy(config)
        changed["quantization_config"]["sites"][0][field] = value
        write(tmp_path, changed)
        with pytest.raises(CheckpointError):
            hf.AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_bias_that_its_linear_adds_is_said_to_be_one(tmp_path: Path) -> None:
    config = copied("v2/inline", tmp_path)
    for key in ("up_bias", "down_bias"):
        changed = copy.deepcopy(config)
        changed["quantization_config"]["sites"][0][key] = None
        write(tmp_path, changed)
        with pytest.raises(CheckpointError, match="says nothing of the bias"):
            hf.AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_site_may_not_be_listed_twice_or_left_out(tmp_path: Path) -> None:
    config = copied("v2/aligned", tmp_path)
    first, second = config["quantization_config"]["sites"]
    for sites in ([first], [first, first], [first, second, second], []):
        config["quantization_config"]["sites"] = sites
        write(tmp_path, config)
        with pytest.raises(CheckpointError):
            hf.AutoModelForCausalLM.from_pretrained(tmp_path)


def test_an_activation_is_the_one_that_the_forward_computes(tmp_path: Path) -> None:
    """Gated right all the same, and silently wrong as soon as the model is lowered."""
    for name, other in (("aligned", "gelu"), ("inline", "gelu"), ("encoder_decoder", "silu"), ("fused", "relu")):
        config = copied(f"v2/{name}", tmp_path)
        config["quantization_config"]["sites"][0]["activation"] = other
        write(tmp_path, config)
        kind = hf.AutoModelForSeq2SeqLM if name == "encoder_decoder" else hf.AutoModelForCausalLM
        with pytest.raises(CheckpointError, match=other):
            kind.from_pretrained(tmp_path)


def test_up_and_down_that_change_places_are_seen_where_their_shapes_agree(tmp_path: Path) -> None:
    """A forward alone tells them apart, and OPT's cannot be traced: its layers are tried when they are loaded."""
    model = zoo.opt(1, ffn_dim=24, enable_bias=False).eval()
    ltepass.transform(model, config=ltepass.LTEConfig(group_size=6))
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (site,) = config["quantization_config"]["sites"]
    site["up"], site["down"] = site["down"], site["up"]
    site["parameters"] = site["parameters"][::-1]
    write(tmp_path, config)
    with pytest.raises(CheckpointError):
        hf.AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_newer_format_says_which_ltepass_is_needed(tmp_path: Path) -> None:
    config = copied("v2/aligned", tmp_path)
    config["quantization_config"] |= {"version": 4, "written_by": "0.4.2", "something": "new"}
    write(tmp_path, config)
    with pytest.raises(CheckpointError, match=r"version 4 .* install ltepass 0\.4\.2 or newer"):
        hf.AutoModelForCausalLM.from_pretrained(tmp_path)
    config["quantization_config"]["written_by"] = "\x1b[2J"
    write(tmp_path, config)
    with pytest.raises(CheckpointError, match="install a newer one") as error:
        hf.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert "\x1b" not in str(error.value)


def strings(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    children = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [text for child in children for text in strings(child)]


@pytest.mark.parametrize("name", ["aligned", "inline", "fused", "encoder_decoder"])
def test_each_name_of_a_parameter_is_written_once(name: str) -> None:
    entry = json.loads((CHECKPOINTS / "v2" / name / "config.json").read_text())["quantization_config"]
    for site in entry["sites"]:
        names = [text for text in strings(site) if text.endswith((".weight", ".bias"))]
        assert len(names) == len(set(names)) > 1
        assert FFNSite.from_dict(site).to_dict() == site


def test_the_first_version_reads_as_the_same_sites() -> None:
    for folder in sorted((CHECKPOINTS / "v1").iterdir()):
        first, second = (
            json.loads((CHECKPOINTS / v / folder.name / "config.json").read_text())["quantization_config"]["sites"]
            for v in ("v1", "v2")
        )
        assert [FFNSite.from_dict(site) for site in first] == [FFNSite.from_dict(site) for site in second]


def test_renaming_reaches_every_field() -> None:
    rows = {n: NeuronRows(param=f"a.{n}.weight", dim=0, start=0, step=1) for n in ("u", "ub", "g", "gb", "d")}
    site = FFNSite(
        name="a", owner="a", kind="aligned", router="a.router", up="a.u", gate="a.g", down="a.d", activation="silu",
        d_model=2, d_ff=4, up_rows=rows["u"], up_bias=rows["ub"], gate_rows=rows["g"], gate_bias=rows["gb"],
        down_rows=rows["d"], down_bias="a.d.bias", neurons=tuple(rows.values()), group_size=2,
    )  # fmt: skip
    moved = site.renamed(lambda path: f"b.{path}").to_dict()
    names = [text for text in strings(moved) if text not in ("aligned", "silu")]
    assert len(names) == 7 + 5
    assert all(text.startswith("b.a") for text in names)
    assert site.renamed(lambda path: f"b.{path}").renamed(lambda path: path.removeprefix("b.")) == site
    assert replace(site, name="a#1").renamed(lambda path: f"b.{path}").name == "b.a#1"


@pytest.mark.parametrize("version", ["v1", "v2"])
@pytest.mark.parametrize("name", ["aligned", "inline", "fused"])
def test_the_base_model_can_do_all_that_the_whole_can(name: str, version: str, tmp_path: Path) -> None:
    base = hf.AutoModel.from_pretrained(CHECKPOINTS / version / name)
    whole = hf.AutoModelForCausalLM.from_pretrained(CHECKPOINTS / version / name)
    with torch.no_grad():
        want = base(IDS).last_hidden_state
        if name != "inline":  # OPT's base model is one level further up
            assert torch.equal(whole.model(IDS).last_hidden_state, want)
        torch.testing.assert_close(ltepass.lower(base)(IDS).last_hidden_state, want)
        ltepass.unlower(base)
        ltepass.calibrate(base, [IDS])
        ltepass.set_mode(base, "hard")
        ltepass.set_sparsity(base, 0.6)
        want = base(IDS).last_hidden_state
        base.save_pretrained(tmp_path)
        assert torch.equal(hf.AutoModel.from_pretrained(tmp_path)(IDS).last_hidden_state, want)
        again = hf.AutoModelForCausalLM.from_pretrained(tmp_path)  # with the prefix again, and a new head
        assert torch.equal(again.base_model(IDS).last_hidden_state, want)
    assert [site.down for site in lte_state(again).sites] == [site.down for site in lte_state(whole).sites]


def test_another_head_keeps_the_gates() -> None:
    model = hf.AutoModelForSequenceClassification.from_pretrained(CHECKPOINTS / "v2/aligned", num_labels=3)
    assert len(lte_state(model).sites) == 2
    whole = hf.AutoModelForCausalLM.from_pretrained(CHECKPOINTS / "v2/aligned")
    assert torch.equal(model.model(IDS).last_hidden_state, whole.model(IDS).last_hidden_state)


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


def test_text_of_a_checkpoint_reaches_the_terminal_as_text(tmp_path: Path) -> None:
    config = copied("v2/aligned", tmp_path)
    foul = "[/red]\x1b]0;owned\x07[bold]\n\u202etxt"
    keys = ("module", "node", "check", "reason", "nearest")
    config["quantization_config"]["refusals"] = [dict.fromkeys(keys, foul)]
    write(tmp_path, config)
    text = str(ltepass.report(hf.AutoModelForCausalLM.from_pretrained(tmp_path)))
    assert "[/red]" in text
    assert all(c.isprintable() or c == "\n" for c in text)
    assert Refusal(module="m", node="n", check="c", reason="two\nlines").reason == "two lines"
