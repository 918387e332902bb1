"""vLLM's answers to a list of questions, in a process of its own: it changes transformers' classes for good.

A question is a folder, prompts, and options of vLLM's LLM; an answer its tokens and what ran, or what was raised.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path
from typing import TypedDict

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}

TOKENS = 64  # of an answer
OPTIONS = {
    "dtype": "float32",
    "max_model_len": 192,
    "max_num_seqs": 8,
    "skip_tokenizer_init": True,
    "distributed_executor_backend": "uni",
    "enforce_eager": True,
}


class Question(TypedDict):
    folder: str
    prompts: list[list[int]]
    options: dict[str, bool | int | str]


class Answer(TypedDict):
    tokens: list[list[int]]
    ran: str  # the class
    lowered: list[str]  # FFNs
    notes: list[str]


class Refused(TypedDict):
    error: str


def answer(question: Question) -> Answer:
    from vllm import LLM, SamplingParams

    from ltepass.routed.routed import state_of

    llm = LLM(model=question["folder"], **{**OPTIONS, **question["options"]})
    greedy = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True, detokenize=False)
    prompts = [{"prompt_token_ids": ids} for ids in question["prompts"]]
    tokens = [list(done.outputs[0].token_ids) for done in llm.generate(prompts, greedy, use_tqdm=False)]
    model = llm.llm_engine.model_executor.driver_worker.get_model()
    state = state_of(model.model)
    names = [] if state is None or state.lowered is None else [site.name for site in state.sites]
    notes = [] if state is None else [*state.notes, *state.untried]
    return {"tokens": tokens, "ran": type(model).__name__, "lowered": names, "notes": notes}


def answer_or_error(question: Question) -> Answer | Refused:
    from vllm.distributed import cleanup_dist_env_and_memory

    try:
        return answer(question)
    except Exception as error:  # the test says which it expects
        return {"error": f"{type(error).__name__}: {error}"}
    finally:
        gc.collect()
        cleanup_dist_env_and_memory()


if __name__ == "__main__":
    questions, answers = map(Path, sys.argv[1:])
    answers.write_text(json.dumps([answer_or_error(q) for q in json.loads(questions.read_text())]))
