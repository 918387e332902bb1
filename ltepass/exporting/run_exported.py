"""Run what `ltepass.export` wrote: without the model's own code and without transformers (`ExportedDecoder`), or under
transformers' own `generate`, the same call and the same tokens, at the folder's speed (`exported_loop`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ltepass.errors import ConfigError, ExportError
from ltepass.exporting.folder import ABOUT, DECODE, PREFILL, WEIGHTS, layout, read_about, weights
from ltepass.kernels import attention as _attention  # noqa: F401 -- registers what the graphs call
from ltepass.kernels import linear as _linear  # noqa: F401
from ltepass.kernels import shortlist as _shortlist  # noqa: F401
from ltepass.kernels.cpu import loading
from ltepass.passes.capture.decoder_step import WITHIN

if TYPE_CHECKING:
    from torch.export.pt2_archive._package import AOTICompiledModel
    from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
    from transformers.generation.streamers import BaseStreamer


Pick = Callable[[Tensor], int]  # logits [vocab] -> a token


def greedy(logits: Tensor) -> int:
    return int(logits.argmax())


class ExportedDecoder:
    """A folder of `ltepass.export`, loaded. Its code runs: load only what you trust (SECURITY.md).

    One sequence at a time; `cache` and `position` are its state. Raises ExportError where this machine cannot run it.
    """

    def __init__(self, folder: Path) -> None:
        self.about = read_about(folder)
        if not loading.load():
            raise ExportError("the CPU kernels could not be built (the warning says why), and a package needs them")
        self._weights = weights(folder)  # the graphs read them where they lie
        self._decode, self._prefill = (self._graph(folder / name) for name in (DECODE, PREFILL))
        # What no token has written is never read: pages of it need no memory before.
        self.cache = torch.empty(self.about.cache, dtype=getattr(torch, self.about.cache_dtype))
        self.position = 0

    def _graph(self, file: Path) -> AOTICompiledModel:
        """A compiled graph with its weights, which it reads unasked: a shape that it does not expect would be other
        memory.
        """
        from torch._inductor import aoti_load_package

        try:
            graph = aoti_load_package(str(file))
        except RuntimeError as error:
            raise ExportError(f"{file} cannot be read ({error}); export the model again") from error
        told = graph.loader.get_metadata()
        if not self.about.call().items() <= told.items():
            raise ExportError(f"{file.parent / ABOUT} is of another export than {file.name}; export the model again")
        expected = json.loads(told.get("weights", "{}"))
        mine: dict[str, Tensor] = {}
        for name in graph.get_constant_fqns():
            tensor = self._weights.get(name)
            found = "missing" if tensor is None else layout(tensor)
            if tensor is None or found != expected.get(name, found):
                raise ExportError(f"{WEIGHTS}: {name} is {found}; {file.name} expects {expected.get(name, 'it')}")
            mine[name] = tensor
        graph.load_constants(mine, check_full_update=True, user_managed=True)
        return graph

    @property
    def weights(self) -> list[Tensor]:
        """What both graphs read."""
        return list(self._weights.values())

    @property
    def thresholds(self) -> dict[str, Tensor]:
        """By the path of the router in the model that was exported; empty without routers."""
        ends = {name: name.removeprefix(f"{WITHIN}.").removesuffix(".threshold") for name in self._weights}
        return {path: self._weights[name] for name, path in ends.items() if name.endswith(".threshold")}

    @property
    def length(self) -> int:
        """Tokens that the cache holds."""
        return self.about.cache[4]

    def reset(self) -> None:
        """Begin another sequence: what lies in the cache behind `position` is never read."""
        self.position = 0

    def __call__(self, ids: Sequence[int]) -> Tensor:
        """ids: the next tokens of the sequence. Returns the logits [vocab] of the one after them."""
        if not ids or self.position + len(ids) > self.length:
            seen = f"{len(ids)} tokens behind {self.position}"
            raise ExportError(f"{seen} of a cache of {self.length}; expected at least 1, and all within it")
        graph = self._decode if len(ids) == 1 else self._prefill
        with torch._C._AutoDispatchBelowAutograd():  # else every op's autograd rule is asked, in Python: 10 us a call
            (logits,) = graph.loader.boxed_run([torch.tensor([list(ids)]), torch.tensor(self.position), self.cache])
        self.position += len(ids)
        return logits[0, -1]

    def generate(self, prompt: Sequence[int], new_tokens: int, pick: Pick = greedy) -> Iterator[int]:
        """Tokens that follow a prompt, one by one, up to an end token (which is the last) or a full cache."""
        self.reset()
        ids: Iterable[int] = prompt
        for _ in range(new_tokens):
            token = pick(self(list(ids)))
            yield token
            if token in self.about.eos or self.position == self.length:
                return
            ids = [token]


# What a call may ask of `generate` that the loop does not give.
REFUSED = ("return_dict_in_generate", "output_scores", "output_logits", "output_attentions", "output_hidden_states")


def exported_loop(folder: str | Path, streamer: BaseStreamer | None = None) -> Callable[..., Tensor]:
    """For `generate(..., custom_generate=loop)` of the model that was exported.

    transformers prepares the prompt, logits processors and stopping criteria as always. One sequence, greedy or
    sampled.

    Arguments:
        folder: that `ltepass.export` wrote. Its code runs: load only what you trust (SECURITY.md).
        streamer: gets the tokens; given here, because transformers hands none to a loop that is not its own.
    Returns: the loop, which gives [1, prompt and new tokens] int64.
    Raises: ExportError for a folder of another machine or version. The loop: ConfigError for a batch, beams, padding,
        or more output than tokens: leave custom_generate out then.
    Example:
        >>> ltepass.set_mode(model, "hard")
        >>> loop = ltepass.exported_loop(ltepass.export(model, folder, length=40))
        >>> out = model.generate(ids[:1], max_new_tokens=4, do_sample=False, custom_generate=loop)
        >>> torch.equal(out, model.generate(ids[:1], max_new_tokens=4, do_sample=False))
        True
    """
    decoder = ExportedDecoder(Path(folder))

    @torch.no_grad()
    def loop(model: PreTrainedModel, input_ids: Tensor, **prepared: object) -> Tensor:
        return _decode(decoder, streamer, input_ids, **prepared)  # type: ignore[arg-type]  # transformers' own, by name

    return loop


def _decode(
    decoder: ExportedDecoder,
    streamer: BaseStreamer | None,
    ids: Tensor,
    *,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    attention_mask: Tensor | None = None,
    inputs_embeds: Tensor | None = None,
    **_: object,
) -> Tensor:
    _check(ids, attention_mask, inputs_embeds, generation_config)
    put = streamer.put if streamer is not None else lambda tokens: None
    decoder.reset()
    step = ids[0].tolist()
    put(ids)
    while True:
        scores = logits_processor(ids, decoder(step)[None].to(torch.float32, copy=True))
        if generation_config.do_sample:
            token = torch.multinomial(scores.softmax(-1), num_samples=1)
        else:
            token = scores.argmax(-1, keepdim=True)
        ids = torch.cat([ids, token], dim=1)
        put(token[0])
        if bool(stopping_criteria(ids, scores).all()):
            break
        step = token[0].tolist()
    if streamer is not None:
        streamer.end()
    return ids


def _check(ids: Tensor, mask: Tensor | None, embeds: Tensor | None, config: GenerationConfig) -> None:
    seen = [name for name in REFUSED if getattr(config, name, False)]
    seen += ["inputs_embeds"] if embeds is not None else []
    seen += [f"{len(ids)} sequences"] if len(ids) != 1 else []
    seen += ["padding"] if mask is not None and not bool(mask.all()) else []
    seen += [f"num_beams={config.num_beams}"] if (config.num_beams or 1) > 1 else []
    if seen:
        expected = "one sequence without padding, greedy or sampled, and its tokens alone"
        raise ConfigError(f"the call has {', '.join(seen)}; expected {expected}; leave custom_generate out")
