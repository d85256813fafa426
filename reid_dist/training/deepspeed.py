"""DeepSpeed as the engine: ZeRO 0-3, fp32 and bf16, and state that does not know the number of workers.

Pinned to DeepSpeed 0.19.8, whose behaviour was measured. Why each choice:

- torch's Adam (its fused one compiles an extension at start); ZeRO wants `zero_allow_untested_optimizer` for it.
- bf16 needs ZeRO 1 or more: at stage 0 DeepSpeed's bf16 optimizer takes a real step while it initialises (3e-2 off).
- One backward per step (training/step.py): DeepSpeed never accumulates, so losses are never divided behind our back.
- State is saved per parameter *name* in fp32, with each group's step: it loads into any worker count and stage. DeepSpeed's own
  universal checkpoint loads stage 3 wrongly (9.6e-2 off) and is not used; its `safe_get_*` helpers answer None at stage 0, miss
  all groups but the first at stages 1-2 until relinked, and fail on uneven sizes at stage 3, hence the small adapters below.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from reid_dist.config import OptimConfig, TrainingConfig
from reid_dist.methods.spec import ParamGroup
from reid_dist.training.collectives import world
from reid_dist.training.optim import build_optimizer, freeze_others

PARAM_STATE = ("exp_avg", "exp_avg_sq", "momentum_buffer")  # what torch's Adam and SGD keep per element

EngineState = dict[str, dict[str, Tensor]]
"""{"param": {name: fp32 value}, "exp_avg": {...}, ..., "step": {name: scalar}}, all on CPU, the same for every layout."""


def build_engine(
    module: nn.Module, model: nn.Module, groups: Sequence[ParamGroup], optim: OptimConfig, training: TrainingConfig
) -> Any:
    """DeepSpeed engine over `module` (the step module that wraps `model`). Parameters in no group are frozen."""
    ensure_process_group()
    import deepspeed

    freeze_others(model, groups)
    optimizer = build_optimizer(model, groups, optim)
    engine, *_ = deepspeed.initialize(
        model=module, optimizer=optimizer, config=_engine_config(training), dist_init_required=False
    )
    kinds = {parameter.dtype for parameter in model.parameters()} if training.zero_stage == 0 else set()
    if torch.float64 in kinds:
        _reduce_also(engine, torch.float64, torch.float64)
    elif torch.float16 in kinds:
        _reduce_also(engine, torch.float16, torch.float32)
    return engine


def _reduce_also(engine: Any, kind: torch.dtype, wire: torch.dtype) -> None:
    """Let stage 0 average gradients of a type that DeepSpeed refuses (float64 anywhere, float16 on CPUs), sent as `wire`."""
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    known = [other for other in accelerator.supported_dtypes() if other != kind]
    accelerator.supported_dtypes = lambda: [*known, kind]
    engine.communication_data_type = wire


def ensure_process_group() -> None:
    """A process of one's own outside any launcher: DeepSpeed wants a group even for one rank."""
    _quiet()
    import deepspeed

    if not dist.is_initialized():
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    # ZeRO's stages import the Muon optimizer, whose functions are decorated with torch.compile: loading the compiler costs each
    # worker 5 s of CPU, for an optimizer that no recipe can name.
    deepspeed.runtime.compiler.compile = lambda: deepspeed.runtime.compiler.dummy_decorator
    # DeepSpeed would compile a shared-memory collective at start (10 s, needs a compiler) whose static state then survives
    # the process group: after a change of world size it sums wrongly. Plain gloo is exact.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False, verbose=False)


def _quiet() -> None:
    """Before DeepSpeed is imported: it guesses its accelerator then, aloud."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    os.environ.setdefault("LOCAL_RANK", "0")
    for name in ("DeepSpeed", "deepspeed"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _engine_config(training: TrainingConfig) -> dict[str, Any]:
    _, size = world()
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,  # the plan decides; DeepSpeed only multiplies it into its own counters
        "gradient_accumulation_steps": 1,
        "train_batch_size": size,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": training.zero_stage,
            # Every parameter sharded: the default keeps small ones whole, which small models would never leave.
            "stage3_param_persistence_threshold": 0,
            "overlap_comm": torch.cuda.is_available() and training.zero_stage in (1, 2, 3),
        },
        "gradient_clipping": training.gradient_clip or 0.0,
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }
    if training.precision == "bf16":
        config["bf16"] = {"enabled": True}
    if training.precision != "fp32":
        config["communication_data_type"] = "fp32"
    return config


class StateAdapter(Protocol):
    """Reads and writes an engine's weights and optimizer state by parameter name. Reading is collective."""

    def export(self) -> EngineState: ...

    def restore(self, state: Mapping[str, Mapping[str, Tensor]]) -> None: ...


def adapter(engine: Any, model: nn.Module) -> StateAdapter:
    """The adapter of the engine's optimizer class; refuses classes that were not measured."""
    kind = type(engine.optimizer).__name__
    if kind in ("Adam", "AdamW", "SGD"):
        return _Plain(engine, model)
    if kind == "DeepSpeedZeroOptimizer":
        return _Zero12(engine, model)
    if kind == "DeepSpeedZeroOptimizer_Stage3":
        return _Zero3(engine, model)
    raise RuntimeError(
        f"DeepSpeed optimizer {kind} is not one whose state can be saved here; use zero_stage 0-3 in fp32 or bf16"
    )


def _trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


class _Plain:
    """Stage 0: a torch optimizer over whole fp32 parameters."""

    def __init__(self, engine: Any, model: nn.Module) -> None:
        self.optimizer, self.model = engine.optimizer, model

    def export(self) -> EngineState:
        result: EngineState = {"param": {}, "step": {}}
        for name, parameter in _trainable(self.model).items():
            result["param"][name] = parameter.detach().float().cpu().clone()
            state = self.optimizer.state.get(parameter, {})
            for key in PARAM_STATE:
                if state.get(key) is not None:
                    result.setdefault(key, {})[name] = state[key].detach().float().cpu().clone()
            if "step" in state:
                result["step"][name] = state["step"].detach().float().cpu().clone()
        return result

    def restore(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        for name, parameter in _trainable(self.model).items():
            parameter.data.copy_(state["param"][name])
            own: dict[str, Tensor] = {}
            for key in PARAM_STATE:
                if name in state.get(key, {}):
                    own[key] = state[key][name].to(parameter.device, parameter.dtype).reshape(parameter.shape).clone()
            if name in state.get("step", {}):
                own["step"] = state["step"][name].clone()
            if own:
                self.optimizer.state[parameter] = own


class _Flat:
    """What stages 1-3 share: the inner torch optimizer holds flat fp32 tensors, each with one step count."""

    def __init__(self, engine: Any, model: nn.Module) -> None:
        self.zero, self.model = engine.optimizer, model
        self.inner = engine.optimizer.optimizer

    def flats(self) -> list[Tensor]:
        raise TypeError("abstract")

    def flat_of(self, parameter: nn.Parameter) -> Tensor:
        raise TypeError("abstract")

    def _ensure_state(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """A fresh engine has no optimizer state: make it, with an own step tensor per flat group."""
        keys = [key for key in PARAM_STATE if state.get(key)]
        for flat in self.flats():
            own = self.inner.state[flat]
            for key in keys:
                if own.get(key) is None:
                    own[key] = torch.zeros_like(flat.data)
            if state.get("step"):
                own["step"] = torch.zeros((), dtype=torch.float32)

    def _steps(self) -> dict[str, Tensor]:
        steps = {}
        for name, parameter in _trainable(self.model).items():
            own = self.inner.state.get(self.flat_of(parameter), {})
            if "step" in own:
                steps[name] = torch.as_tensor(own["step"], dtype=torch.float32).cpu().clone()
        return steps

    def _restore_steps(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        for name, parameter in _trainable(self.model).items():
            if name in state.get("step", {}):
                self.inner.state[self.flat_of(parameter)]["step"].copy_(state["step"][name])


class _Zero12(_Flat):
    """Stages 1 and 2: each rank owns a range of each flat group; parameters know their fragment (`_hp_mapping`)."""

    def flats(self) -> list[Tensor]:
        return list(self.zero.single_partition_of_fp32_groups)

    def flat_of(self, parameter: nn.Parameter) -> Tensor:
        for index, group in enumerate(self.zero.bit16_groups):
            if any(member is parameter for member in group):
                return self.zero.single_partition_of_fp32_groups[index]
        raise RuntimeError("a trainable parameter is in no ZeRO group")

    def _relink(self) -> None:
        # Only group 0 is linked after real steps; force the fragments of every group to be looked up again.
        self.zero._hp_optimizer_states_linked = False
        self.zero._lazy_init_hp_params_optimizer_state()

    def export(self) -> EngineState:
        keys = [key for key in PARAM_STATE if self.inner.state.get(self.flats()[0], {}).get(key) is not None]
        if keys:
            self._relink()
        result: EngineState = {"param": {}, "step": self._steps()}
        for name, parameter in _trainable(self.model).items():
            result["param"][name] = parameter.get_full_hp_param().cpu()
            for key in keys:
                result.setdefault(key, {})[name] = parameter.get_full_hp_param(key).cpu()
        return result

    def restore(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        keys = [key for key in PARAM_STATE if state.get(key)]
        if keys:
            self._ensure_state(state)
            self._relink()
        for name, parameter in _trainable(self.model).items():
            value = state["param"][name].to(parameter.device)
            parameter.set_full_hp_param(value.float())
            parameter.data.copy_(value)  # setters write the fp32 master alone
            for key in keys:
                parameter.set_full_hp_param(state[key][name].to(parameter.device).float(), key)
        self._restore_steps(state)


class _Zero3(_Flat):
    """Stage 3: each rank owns a padded slice of every parameter."""

    def flats(self) -> list[Tensor]:
        return list(self.zero.fp32_partitioned_groups_flat)

    def flat_of(self, parameter: nn.Parameter) -> Tensor:
        group, _, _ = self.zero.grad_position[self.zero.get_param_id(parameter)]
        return self.zero.fp32_partitioned_groups_flat[group]

    def _local(self, parameter: nn.Parameter, key: str | None) -> Tensor:
        group, start, count = self.zero.grad_position[self.zero.get_param_id(parameter)]
        flat = self.zero.fp32_partitioned_groups_flat[group]
        whole = flat if key is None else self.inner.state[flat][key]
        return whole.narrow(0, start, count)

    def _slice(self, value: Tensor, parameter: nn.Parameter) -> Tensor:
        """This rank's padded slice of a whole value."""
        rank, size = world()
        count = parameter.ds_tensor.numel()
        padded = torch.zeros(count * size, dtype=torch.float32)
        padded[: value.numel()] = value.float().flatten()
        return padded[rank * count : (rank + 1) * count]

    def export(self) -> EngineState:
        keys = [key for key in PARAM_STATE if self.inner.state.get(self.flats()[0], {}).get(key) is not None]
        result: EngineState = {"param": {}, "step": self._steps()}
        for name, parameter in _trainable(self.model).items():
            result["param"][name] = self.zero.get_full_hp_param(parameter).float().cpu().clone()
            for key in keys:
                result.setdefault(key, {})[name] = self.zero.get_full_hp_param(parameter, key).float().cpu().clone()
        return result

    def restore(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        keys = [key for key in PARAM_STATE if state.get(key)]
        if keys:
            self._ensure_state(state)
        for name, parameter in _trainable(self.model).items():
            piece = self._slice(state["param"][name], parameter)
            self._local(parameter, None).data.copy_(piece)
            parameter.ds_tensor.data.copy_(piece)
            for key in keys:
                self._local(parameter, key).data.copy_(self._slice(state[key][name], parameter))
        self._restore_steps(state)


def whole_parameters(model: nn.Module, names: Sequence[str]) -> dict[str, Tensor]:
    """CPU copies of parameters that may be sharded (stage 3); collective."""
    import deepspeed

    parameters = dict(model.named_parameters())
    result = {}
    for name in names:
        with deepspeed.zero.GatheredParameters([parameters[name]], enabled=hasattr(parameters[name], "ds_id")):
            result[name] = parameters[name].detach().cpu().clone()
    return result
