"""vLLM's async engine as a writer of reasonings: each joins the ones that are being written, and leaves on its own."""

from __future__ import annotations

import asyncio
import copy
import itertools
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

from r2ec_trl.policy.rollouts import MarkerReader, Rollout
from r2ec_trl.vllm.engine import adapter_folder, engine_options, sampling

START_SECONDS = 600.0  # for the engine to load the model and its adapter


class AsyncWriter:
    """
    Greedy reasonings through vLLM's `AsyncLLM`, on an event loop in a thread of its own.

    Where [`~r2ec_trl.vllm.engine.generate_reasoning_vllm`] answers a batch once it is whole, here every prompt is a
    request of its own: it is written beside those that came before, is heard token by token, and its slot is free once
    it ends or is no longer wanted.

    Args:
        policy ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]), max_model_length, options:
            As in [`~r2ec_trl.vllm.engine.load_engine`].
        reader ([`~r2ec_trl.policy.rollouts.MarkerReader`]):
            Says where a rollout ends; copied, because tokenizers are not for two threads.
        max_new_tokens (`int`):
            Longest reasoning.
    """

    def __init__(
        self,
        policy: Any,
        reader: MarkerReader,
        max_new_tokens: int,
        max_model_length: int | None = None,
        **options: Any,
    ):
        self.reader = MarkerReader(copy.deepcopy(reader.tokenizer), reader.marker)
        self._policy, self._options = policy, engine_options(policy, max_model_length, **options)
        self._engine: Any = None
        self._adapter: Any = None
        self._numbers = itertools.count()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="vllm", daemon=True)
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._begin_engine(max_new_tokens), self._loop).result(START_SECONDS)

    @property
    def alive(self) -> bool:
        """Whether the engine's process still works."""
        return self._engine is not None and not self._engine.errored

    def write(self, prompt_ids: Sequence[int], heard: Callable[[list[int]], bool]) -> Future[Rollout]:
        """
        Begin one reasoning.

        Args:
            prompt_ids (`Sequence[int]`):
                Token ids of the user prompt.
            heard (`Callable`):
                Called on the engine's thread with the ids so far, again and again; `True` ends the reasoning there.
        """
        return asyncio.run_coroutine_threadsafe(self._write_one(list(prompt_ids), heard), self._loop)

    def close(self) -> None:
        """End the engine's process and the thread."""
        self._loop.call_soon_threadsafe(self._engine.shutdown)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._engine = None

    async def _begin_engine(self, max_new_tokens: int) -> None:
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.lora.request import LoRARequest
        from vllm.v1.engine.async_llm import AsyncLLM

        self._engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**self._options))
        self._params, self._end_ids = sampling(self._engine.model_config, self.reader, max_new_tokens)
        if "enable_lora" in self._options:
            with adapter_folder(self._policy) as folder:
                self._adapter = LoRARequest("policy", 1, str(folder))
                await self._engine.add_lora(self._adapter)

    async def _write_one(self, prompt_ids: list[int], heard: Callable[[list[int]], bool]) -> Rollout:
        ids: list[int] = []
        written = self._engine.generate(
            {"prompt_token_ids": prompt_ids}, self._params, str(next(self._numbers)), lora_request=self._adapter
        )
        async for output in written:
            ids = list(output.outputs[0].token_ids)
            if heard(ids):
                await written.aclose()  # which takes the request out of the engine
                break
        return self.reader.finish(ids, self._end_ids)
