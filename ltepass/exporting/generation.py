"""An exported folder under transformers' own `generate`: the same call and the same tokens, at the folder's speed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ltepass.errors import ConfigError
from ltepass.exporting.decoder import ExportedDecoder

if TYPE_CHECKING:
    from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
    from transformers.generation.streamers import BaseStreamer

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
