"""Save and load for any module: safetensors, and beside them the site list as JSON. Hugging Face models need neither:
their own save_pretrained and from_pretrained do the same.
"""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path

from torch import Tensor, nn

from ltepass.config import LTEConfig
from ltepass.errors import AlreadyTransformedError, CheckpointError, MetaWeightsError, NotTransformedError
from ltepass.passes.insert.insert_routers import insert_routers
from ltepass.routed.narrowing import narrow_to
from ltepass.routed.routed import Routed, require_whole, routers_of, set_state, state_of, unwrapped
from ltepass.routed.torchao_weights import is_quantised, weights_of
from ltepass.routed.undo import all_or_nothing, undo_by
from ltepass.saving.forward_checks import as_gated_now, check_forwards, try_gates
from ltepass.saving.site_checks import check_sites
from ltepass.saving.state_json import read_state, write_state
from ltepass.saving.tensor_checks import check_all, check_routers, check_values, read_header
from ltepass.saving.torchao_files import check_codes, check_linears, flat, joined, whole
from ltepass.whole_file import whole_file

SITES, WEIGHTS = "lte.json", "model.safetensors"


def save(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Write a transformed module's weights, routers and site list into a folder.

    Arguments:
        model: the transformed root. A Hugging Face model has `save_pretrained` for the same.
        folder: made where it is missing.
    Returns: None.
    Raises: NotTransformedError for a module that is not itself the transformed root, MetaWeightsError, ShardedError,
        CheckpointError where `load` could not read what would be written; nothing is then written.
    Example:
        >>> ltepass.save(model, folder)
    """
    from safetensors.torch import save_file

    model = unwrapped(model)
    state = state_of(model)
    if state is None:
        parts = [name for name, module in model.named_modules() if "_lte" in module.__dict__]
        where = f"only {parts[0]} was transformed: save that" if parts else "call ltepass.transform(model) first"
        raise NotTransformedError(f"{type(model).__name__} holds no site list; ltepass.save writes a root; {where}")
    _check_real(model, "save")
    require_whole(model, "save")
    entry = write_state(state)
    read_state(json.loads(json.dumps(entry)))
    names = dict(model.named_parameters(remove_duplicate=False))
    wrapped = [rows.param for site in state.sites for rows in site.neurons if rows.param not in names]
    if wrapped:
        raise CheckpointError(
            f"{wrapped[0]} has another name now; expected the linears unwrapped; merge adapters first"
        )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with whole_file(folder / WEIGHTS) as weights, whole_file(folder / SITES) as sites:
        try:
            tensors, metadata = _tensors(model)
            save_file(tensors, weights, metadata={**metadata, "format": "pt"})
        except RuntimeError as error:  # parameters that share a part of their memory, which safetensors cannot say
            raise CheckpointError(f"{type(model).__name__} cannot be written as safetensors ({error})") from error
        sites.write_text(json.dumps(entry, indent=2, sort_keys=True) + "\n")


def _tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The module's state, what it holds under several names under the first, in the layout that lowering may change;
    and what torchao says of weights in codes.
    """
    first = {id(tensor): name for name, tensor in reversed(model.state_dict(keep_vars=True).items())}
    names = set(first.values())
    state = {name: tensor for name, tensor in model.state_dict().items() if name in names}
    tensors, metadata = flat(state) if is_quantised(model) else (state, {})
    return {name: tensor.contiguous() for name, tensor in tensors.items()}, metadata


def load(model: nn.Module, folder: str | os.PathLike[str]) -> nn.Module:
    """Make a freshly built dense module what `save` wrote, in place.

    Arguments:
        model: of the class and sizes that were saved, on any device, in any float dtype (routers stay fp32). FFNs may
            be as wide as before `prune`: they become as narrow as what was saved, in new parameters.
        folder: what `save` wrote.
    Returns: the model, in hard mode.
    Raises: AlreadyTransformedError, MetaWeightsError, ShardedError, CheckpointError; the module is then as it was.
    Example:
        >>> ltepass.set_mode(model, "hard")
        >>> ltepass.save(model, folder)
        >>> torch.equal(ltepass.load(dense, folder)(ids).logits, model(ids).logits)
        True
    """
    root = unwrapped(model)

    def work() -> nn.Module:
        _load(root, Path(folder))
        return model

    return all_or_nothing(root, work)


def _load(model: nn.Module, folder: Path) -> None:
    from safetensors.torch import load_file

    require_whole(model, "load")
    if state_of(model) is not None or any(routers_of(model)):
        raise AlreadyTransformedError(
            f"{type(model).__name__} has routers already; ltepass.load expects a dense module, as the class builds it"
        )
    _check_real(model, "load")
    state = read_state(_read_json(folder / SITES))
    header, packed = whole(read_header([folder / WEIGHTS]))
    check_routers(state.sites, state.config, header)
    state.narrowed = narrow_to(model, state.sites)
    check_sites(model, state.sites)
    check_all(model, header, [site.router for site in state.sites])
    check_linears(model, {name: header[name] for name in packed})
    state.sites = as_gated_now(model, state.sites)
    check_forwards(model, state.sites)
    tensors = load_file(folder / WEIGHTS)
    for site in state.sites:
        prefix = site.router + "."
        check_values(site, {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
    insert_routers(model, state.sites, LTEConfig(**state.config))
    set_state(model, state)
    _fill(model, tensors)
    for name in packed:
        linear = model.get_submodule(name.rpartition(".")[0])
        own = linear.get_parameter("weight")
        linear._parameters["weight"] = joined(name, tensors, own.dtype).to(own.device)  # type: ignore[assignment]
    check_codes(model)
    state.weights = weights_of(model)
    for router in Routed.of(model, "load").routers:
        router.mode = "hard"
    state.untried = try_gates(model, state.sites)


def _fill(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Every tensor of the module becomes what its file says, on its device and in its dtype; undone with the load."""
    state = model.state_dict(keep_vars=True)
    undo_by(partial(_set_data, [(tensor, tensor.data) for tensor in state.values()]))
    for name, tensor in state.items():
        if name in tensors:
            tensor.data = tensors[name].to(tensor.device, tensor.dtype)


def _set_data(values: list[tuple[Tensor, Tensor]]) -> None:
    for tensor, data in values:
        tensor.data = data


def _check_real(model: nn.Module, what: str) -> None:
    meta = next((name for name, p in model.named_parameters() if p.is_meta), None)
    if meta is not None:
        raise MetaWeightsError(f"{meta} is on the meta device; ltepass.{what} expects real weights")


def _read_json(path: Path) -> object:
    """What `save` wrote into the file. Raises CheckpointError."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({error}); expected what ltepass.save wrote") from error
