"""vLLM's weights after each update: merged weights pushed with the base left alone, or the LoRA adapter hot-loaded."""

from __future__ import annotations

import functools
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object, is_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.integrations import dequantize_module_weight
from trl.generation import vllm_generation
from trl.generation.vllm_client import VLLMClient
from trl.generation.vllm_generation import VLLMGeneration
from trl.trainer import grpo_trainer

from r2ec_trl.errors import UserError
from r2ec_trl.policy.adapters import is_packed
from r2ec_trl.policy.batching import positions_of
from r2ec_trl.policy.rollouts import MarkerReader, Rollout
from r2ec_trl.vllm.engine import adapter_folder, base_revision, marker_stop, use_adapter
from r2ec_trl.vllm.guards import check_installed, check_model, check_server, check_settings, kernel_rank

CONNECT_TIMEOUT, ANSWER_TIMEOUT = 10.0, 1800.0  # seconds; a request to a server may hold a whole generation batch


@contextmanager
def vllm_backend(
    args: Any, timed: Callable[[], AbstractContextManager], end_ids: Callable[[], list[int]]
) -> Iterator[None]:
    """
    Around the `__init__` of TRL's trainer: lets it build our generation class once the early checks have passed.

    Args:
        args ([`~r2ec_trl.training.recpo_config.RecPOConfig`]):
            The run's settings.
        timed (`Callable`):
            Gives the context manager that each sync runs in.
        end_ids (`Callable`):
            Gives the ids that end a generation, once TRL knows them.
    """
    if not args.use_vllm:
        if args.vllm_lora_sync:
            raise UserError("`vllm_lora_sync` says how vLLM gets the adapter; add `--use_vllm`, or leave it out.")
        yield
        return
    check_installed()
    check_settings(args)
    args.generation_kwargs = {**(args.generation_kwargs or {}), **marker_stop(args.marker)}
    kind = AdapterSync if args.vllm_lora_sync else MergedSync

    def build(**kwargs: Any) -> VLLMGeneration:
        kwargs["generation_kwargs"] = {**args.generation_kwargs, "stop_token_ids": end_ids()}
        return kind(settings=args, timed=timed, **kwargs)

    try:
        with _replaced(grpo_trainer, "VLLMGeneration", build):
            yield
    except RuntimeError as error:  # a server without the flags that TRL's weight transfer or correction needs
        if "The vLLM server" not in str(error):
            raise
        raise UserError(" ".join(str(error).split())) from error


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    kept = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, kept)


class MergedSync(VLLMGeneration):
    """
    [`~trl.generation.vllm_generation.VLLMGeneration`] whose base weights never change: TRL merges the adapter into
    them and takes it out again, which leaves rounding errors behind each time and loses a 4-bit base.

    - `_iter_named_params`: merged weights are computed beside the base, one matrix at a time, dequantised if need be.
    - `_init_vllm`: guards first; an engine computes as the policy does, and is never quantised: it gets whole weights.
    - `sync_weights`: timed; an engine gets all weights in one call (TRL makes one a tensor, and each looks every
      parameter up anew); a server that died is said in one sentence, as in `generate`.

    Args:
        settings ([`~r2ec_trl.training.recpo_config.RecPOConfig`]):
            The run's settings.
        timed (`Callable`):
            Context manager around each sync.
        kwargs:
            As in TRL.
    """

    llm: Any

    def __init__(self, settings: Any, timed: Callable[[], AbstractContextManager], **kwargs: Any):
        self.settings = settings
        self.timed = timed
        self.sync_bytes = 0  # moved by the newest sync
        super().__init__(**kwargs)

    @property
    def base_url(self) -> str:
        """Address of the server."""
        return (self.server_base_url or f"http://{self.server_host}:{self.server_port}").rstrip("/")

    # ------------------------------------------------------------------ set-up
    def _init_vllm(self) -> None:
        check_settings(self.settings, positions_of(self.model.config))
        check_model(self.model, self.settings)
        if self.mode == "colocate":
            with _replaced(vllm_generation, "LLM", functools.partial(_engine, self._engine_options())):
                super()._init_vllm()
            return
        if self.accelerator.is_main_process:
            needed = self.settings.max_prompt_length + self.max_completion_length
            hot_load = self.settings.vllm_lora_sync
            check_server(self.base_url, self.model.name_or_path, needed, self.server_timeout, hot_load)
        self._connect()
        if self.accelerator.is_main_process:
            self._bound_waiting()

    def _engine_options(self) -> dict[str, Any]:
        compute = torch.bfloat16 if self.settings.bf16 else torch.float16 if self.settings.fp16 else self.model.dtype
        return {"quantization": None, "dtype": compute, "revision": base_revision(self.model)}

    def _connect(self) -> None:
        super()._init_vllm()

    def _bound_waiting(self, pauses: float = 1.0) -> None:
        """TRL's session waits without end, and asks again for what took too long."""
        session = self.vllm_client.session
        session.request = functools.partial(session.request, timeout=(CONNECT_TIMEOUT, ANSWER_TIMEOUT))
        for adapter in session.adapters.values():
            adapter.max_retries = adapter.max_retries.new(connect=3, read=0, backoff_factor=pauses)

    # -------------------------------------------------------------------- sync
    def sync_weights(self) -> None:
        """Give vLLM the policy as it is now."""
        with self.timed(), self._server_errors():
            if self.mode != "colocate":
                super().sync_weights()
                return
            with _replaced(type(self), "_iter_named_params", lambda self: iter(())):
                super().sync_weights()  # wakes the engine, and forgets the prefixes
            self._load(self._iter_named_params())

    def _load(self, weights: Iterator[tuple[str, torch.Tensor]]) -> None:
        self.llm.llm_engine.model_executor.driver_worker.model_runner.model.load_weights(weights)

    def _iter_named_params(self) -> Iterator[tuple[str, torch.Tensor]]:
        self.sync_bytes = 0
        if is_peft_model(self.model) and not self._dist.is_fsdp:
            params = self._iter_merged_params()
        else:
            params = super()._iter_named_params()
        for name, weight in params:
            self.sync_bytes += weight.nbytes
            yield name, weight

    @torch.no_grad()
    def _iter_merged_params(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Names and weights as TRL's, without writing to the base."""
        model = self.model
        modules = dict(model.named_modules())
        with self._dist.gather_params(list(model.parameters())):
            for name, param in model.named_parameters():
                if model.prefix in name:  # the adapter's own
                    continue
                path, _, leaf = name.rpartition(".")
                parent = modules.get(path.removesuffix(".base_layer"))
                name = name.removeprefix("base_model.model.").replace(".base_layer", "")
                name = self._fix_param_name_to_vllm(name)
                if isinstance(parent, BaseTunerLayer) and path.endswith(".base_layer"):
                    with _merged(parent, leaf) as weight:
                        yield name, weight
                else:
                    yield name, _whole(modules[path], leaf)

    # ---------------------------------------------------------------- rollouts
    def generate(self, *args: Any, **kwargs: Any) -> tuple:
        """As TRL's."""
        with self._server_errors():
            return super().generate(*args, **kwargs)

    def greedy(self, reader: MarkerReader, prompt_ids: Sequence[Sequence[int]], max_new_tokens: int) -> list[Rollout]:
        """
        Greedy rollouts with the current policy, which is given to vLLM first. Every process must call it, each with
        prompts of its own, possibly none.
        """
        self.sync_weights()
        most = max(gather_object([len(prompt_ids)]))
        filler = next(list(ids) for ids in gather_object([list(p) for p in prompt_ids[:1]]))
        padded = [list(ids) for ids in prompt_ids] + [filler] * (most - len(prompt_ids))
        end_ids = self.generation_kwargs["stop_token_ids"]
        stops = {**marker_stop(reader.marker), "stop_token_ids": end_ids}
        completion_ids, _ = self._choose(padded, max_new_tokens, generation_kwargs=stops, logprobs=None)
        ends = {*end_ids, reader.tokenizer.pad_token_id}  # a padding token ends a reasoning on every backend
        return [reader.finish(ids, ends) for ids in completion_ids[: len(prompt_ids)]]

    @torch.no_grad()
    def difference(self, model: Any, prompt_ids: Sequence[Sequence[int]], tokens: int = 8) -> float:
        """
        Mean absolute difference a token of vLLM's log-probs of its own greedy tokens from those of `model`: next to
        nothing where the engine is the policy. TRL measures it on the rollouts, unless sampling is truncated.
        """
        completion_ids, logprobs = self._choose(
            [list(ids) for ids in prompt_ids], tokens, generation_kwargs={"ignore_eos": True}, logprobs=0
        )
        values = []
        for prompt, ids, theirs in zip(prompt_ids, completion_ids, logprobs, strict=True):
            row = torch.tensor([[*prompt, *ids]], device=self.accelerator.device)
            logits = model(input_ids=row, attention_mask=torch.ones_like(row)).logits[0, len(prompt) - 1 : -1]
            ours = logits.float().log_softmax(-1).gather(1, row[0, len(prompt) :, None])[:, 0]
            values.append((ours - torch.tensor([first for first, *_ in theirs], device=ours.device)).abs())
        return torch.cat(values).mean().item()

    def _choose(self, prompt_ids: list[list[int]], max_new_tokens: int, **changed: Any) -> tuple[list, Any]:
        """Greedy completions of TRL's `generate`, one a prompt, and their log-probs."""
        changed |= {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
        changed["max_completion_length"] = max_new_tokens
        kept = {name: getattr(self, name) for name in changed}
        try:
            self.__dict__.update(changed)
            _, completion_ids, logprobs, *_ = self.generate(prompt_ids, None, 1)
        finally:
            self.__dict__.update(kept)
        return [list(ids) for ids in completion_ids], logprobs

    def close(self) -> None:
        """Shut a colocated engine down while the process groups are still there; it complains at exit otherwise."""
        self.accelerator.wait_for_everyone()
        if self.mode == "colocate":
            self.llm.llm_engine.engine_core.shutdown()

    @contextmanager
    def _server_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:  # requests' errors are OSErrors
            if self.mode != "server":
                raise
            raise UserError(
                f"The vLLM server at {self.base_url} stopped answering ({type(error).__name__}); see its log, "
                "restart it and go on with `--resume_from_checkpoint latest`."
            ) from error


class AdapterSync(MergedSync):
    """
    Sends the LoRA adapter alone: no merge, a few megabytes, and a server needs neither NCCL nor a GPU. The engine's
    base is the checkpoint's, pushed once where the policy holds it in 4 bits.

    Each version has its own name, id and folder, so that neither an adapter nor a block of the prefix cache can be
    taken for an older one's; the folder lives in memory, and only until vLLM has read it.
    """

    version = 0

    def __init__(self, *args: Any, **kwargs: Any):
        self.run = uuid.uuid4().hex  # a server keeps an earlier run's; in a container every run has one process id
        super().__init__(*args, **kwargs)

    def _engine_options(self) -> dict[str, Any]:
        config = self.model.peft_config[self.model.active_adapters[0]]
        return {**super()._engine_options(), "enable_lora": True, "max_lora_rank": kernel_rank(config.r)}

    def _connect(self) -> None:
        if self.accelerator.is_main_process:
            self.vllm_client = VLLMClient(base_url=self.base_url, connection_timeout=self.server_timeout)
        self.accelerator.wait_for_everyone()

    def sync_weights(self) -> None:
        """Let vLLM load the adapter as it is now, and forget the one before."""
        with self.timed(), self._adapter_folder() as folder, self._server_errors():
            self.version += 1
            if self.mode == "server":
                if self.accelerator.is_main_process:
                    self._load_on_server(folder)
            else:
                self._load_in_engine(folder)

    @contextmanager
    def _adapter_folder(self) -> Iterator[Path]:
        """The adapter's files; every process takes part, since ZeRO-3 has to gather it."""
        gathered = self._dist.gather_params([param for param in self.model.parameters() if param.requires_grad])
        with gathered, adapter_folder(self.model, self.settings.vllm_lora_folder) as folder:
            self.sync_bytes = (folder / "adapter_model.safetensors").stat().st_size
            yield folder

    def _load_in_engine(self, folder: Path) -> None:
        from vllm.lora.request import LoRARequest

        if self.version == 1 and any(is_packed(param) for param in self.model.parameters()):
            with self.model.disable_adapter():
                self._load(self._iter_merged_params())
        use_adapter(self.llm, LoRARequest(f"policy-{self.version}", self.version, str(folder)))

    def _load_on_server(self, folder: Path) -> None:
        client, before = self.vllm_client, self.vllm_client.model
        name = f"policy-{self.run}-{self.version}"
        self._post("load_lora_adapter", {"lora_name": name, "lora_path": str(folder)})
        client.model = name
        if self.version > 1:
            self._post("unload_lora_adapter", {"lora_name": before})

    def _post(self, action: str, body: dict[str, str]) -> None:
        response = self.vllm_client.session.post(f"{self.base_url}/v1/{action}", json=body)
        if response.status_code != 200:
            raise UserError(
                f"The vLLM server at {self.base_url} refused `{action}` ({' '.join(response.text.split())[:300]}); "
                "it must see `--vllm_lora_folder`, and run with `--enable-lora` and a large enough `--max-lora-rank`."
            )


def _engine(options: dict[str, Any], **kwargs: Any) -> Any:
    from vllm import LLM

    return LLM(**{**kwargs, **options})


@contextmanager
def _merged(layer: Any, leaf: str) -> Iterator[torch.Tensor]:
    """A parameter of a layer's base with the active adapter in it; the base keeps its own storage throughout."""
    base = layer.get_base_layer()
    adapters = [] if layer.disable_adapters else layer.active_adapters
    if is_packed(getattr(base, leaf)):  # PEFT would merge, then quantise the sum
        weight = _whole(base, leaf)
        for adapter in adapters:
            weight = weight + layer.get_delta_weight(adapter).to(weight)
        yield weight
        return
    kept = [(param, param.data) for param in base.parameters()]
    try:
        if adapters and (leaf == "weight" or any(layer.lora_bias.values())):
            layer.merge(safe_merge=True)  # into a copy
        yield getattr(base, leaf).data
    finally:
        layer.merged_adapters.clear()
        for param, data in kept:
            param.data = data


def _whole(module: torch.nn.Module, leaf: str) -> torch.Tensor:
    """A parameter's data, dequantised where a 4-bit base packs it."""
    param = getattr(module, leaf)
    return dequantize_module_weight(module).data if is_packed(param) else param.data
