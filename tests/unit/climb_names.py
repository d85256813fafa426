"""What the CLIMB tests share: the authors' weights as a model of ours, and a small image table that is none."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from reid_dist.config import DataConfig, Recipe, TrainingConfig
from reid_dist.methods.climb import METHOD
from reid_dist.methods.climb.config import Config
from reid_dist.methods.climb.method import ClimbStage
from reid_dist.methods.climb.model import Climb
from reid_dist.methods.climb.weights import our_parameter
from reid_dist.methods.spec import ModelFacts, PlanPart, TrainingData
from reid_dist.models.clip import ClipArchitecture
from tests.unit.mamba_names import tensor

BUFFERS = ("running_mean", "running_var")


def dotted(name: str) -> str:
    """A golden weight name (underscores) -> the authors' (dots)."""
    import re

    name = re.sub(r"^image_encoder_transformer_resblocks_(\d+)_", r"image_encoder.transformer.resblocks.\1.", name)
    name = re.sub(r"^image_encoder_(?!\.)", "image_encoder.", name)
    name = re.sub(r"^(sp_mamba_bi|sp_attention)_(\d)_", r"\1.\2.", name)
    for part in ("attn", "mlp"):
        name = name.replace(f".{part}_", f".{part}.")
    for part in (
        "out_proj", "in_proj", "c_fc", "c_proj", "ln_1", "ln_2", "ln_pre", "ln_post", "conv1", "conv1d", "conv1d_b",
        "x_proj", "x_proj_b", "dt_proj", "dt_proj_b", "bottleneck", "bottleneck_proj", "bottleneck_proj_sp",
        "classifier", "classifier2", "norm2_mamba",
    ):  # fmt: skip
        for leaf in ("weight", "bias", *BUFFERS):
            if part == "in_proj" and ".attn." in name:
                continue  # in_proj_weight is one name there
            if name == f"{part}_{leaf}" or name.endswith(f".{part}_{leaf}"):
                return name[: -len(leaf) - 1] + "." + leaf
    return name


def our_name(golden: str) -> str:
    """Weight name of a golden file, without its w_ prefix -> our parameter or buffer."""
    found = our_parameter(dotted(golden))
    assert found is not None, (golden, dotted(golden))
    return found


def model_of(c: dict[str, Any], **config: Any) -> Climb:
    """A model of the case's sizes with its weights, in float64."""
    tower = "w_image_encoder_conv1_weight" in c
    width, joint = len(c["w_bottleneck_weight"]), len(c["w_bottleneck_proj_weight"])
    layers = len({k for k in c if k.startswith("w_image_encoder_transformer") and k.endswith("ln_1_weight")}) or 1
    arch = ClipArchitecture(
        image_size=tuple(c["in_image_0"].shape[-2:]) if tower else (8, 8),
        patch=c["w_image_encoder_conv1_weight"].shape[-1] if tower else 4,
        stride=c["w_image_encoder_conv1_weight"].shape[-1] if tower else 4,
        image_width=width, image_layers=layers, image_heads=c.get("const_heads", 1), joint_width=joint,
    )  # fmt: skip
    cameras = len(c["w_cv_embed"]) if "w_cv_embed" in c else 0
    settings = Config(
        weights="", states=c["w_sp_mamba_bi_1_A_log"].shape[1], cameras=cameras,
        step_rank=c["w_sp_mamba_bi_1_dt_proj_weight"].shape[1], **config,
    )  # fmt: skip
    model = Climb(settings, arch, len(c["w_classifier_weight"])).double()
    state = model.state_dict()
    given = {our_name(key[2:]): tensor(value) for key, value in c.items() if key.startswith("w_")}
    expected = {n for n in state if not n.endswith("num_batches_tracked") and (tower or not n.startswith("tower."))}
    assert set(given) == expected, set(given) ^ expected
    model.load_state_dict(state | {name: value.reshape(state[name].shape) for name, value in given.items()})
    return model


class FakeView:
    """A table view of noise: images or tracklets of `people`, each seen by `cameras`."""

    def __init__(self, people: int = 5, cameras: int = 2, each: int = 2, frames: tuple[int, ...] = ()) -> None:
        rng = np.random.default_rng(3)
        rows: list[tuple[int, int, int, int]] = []
        for pid in range(people):
            for camera in range(cameras):
                for number in range(each):
                    length = frames[(pid + camera + number) % len(frames)] if frames else 1
                    rows.extend((pid, camera, number if frames else -1, f if frames else -1) for f in range(length))
        rng.shuffle(rows)
        columns = np.array(rows, dtype=np.int64).reshape(-1, 4)
        self.label, self.camid, self.tracklet, self.frame = columns.T.copy()
        self.pid, self.domain = 10 * self.label + 1, np.zeros(len(rows), dtype=np.int64)
        self.looks = rng.integers(40, 215, (people, 3))
        self.takes: list[int] = []

    def __len__(self) -> int:
        return len(self.label)

    def describe(self) -> str:
        return "fake"

    def path(self, row: int) -> str:
        return f"{row}.png"

    def encoded(self, rows: np.ndarray) -> list[bytes]:
        self.takes.append(len(rows))
        made = []
        for row in np.asarray(rows).tolist():
            size = (20 + row % 5, 40 + row % 7, 3)  # frames of several sizes
            noise = np.random.default_rng(row).integers(-30, 30, size)
            picture = np.clip(self.looks[self.label[row]] + noise, 0, 255).astype(np.uint8)
            buffer = io.BytesIO()
            Image.fromarray(picture).save(buffer, format="PNG")
            made.append(buffer.getvalue())
        return made

    def images(self, rows: np.ndarray) -> list[np.ndarray]:
        return [np.array(Image.open(io.BytesIO(data))) for data in self.encoded(rows)]


class Alone:
    """The context of a single process over one whole batch."""

    rank, world_size, seed, epoch, step = 0, 1, 1, 0, 0

    def gather(self, rows: Tensor) -> Tensor:
        return rows

    def reduce(self, value: Tensor) -> Tensor:
        return value

    def extract(self, model: Any, items: np.ndarray, load: Any, encode: Any, batch: int = 128) -> dict[str, Tensor]:
        model.eval()
        with torch.no_grad():
            parts = [encode(model, load(items[i : i + batch])) for i in range(0, len(items), batch)]
        model.train()
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


TINY: dict[str, Any] = {"arch": "tiny", "weights": "", "image_size": (64, 32), "states": 4, "instances": 2}
VIDEO: dict[str, Any] = {**TINY, "frames": 4, "temporal_strides": (1, 2, 4), "sampler": "identity"}


def recipe(batch: int = 6, **model: Any) -> Recipe:
    training = TrainingConfig(global_batch=batch, epochs=2)
    settings = Config(**{**TINY, "iterations": 5, **model})
    return Recipe(name="t", method="climb", model=settings, data=DataConfig(train=("t",)), training=training)


def stage_of(view: FakeView, batch: int = 6, **model: Any) -> ClimbStage:
    (stage,) = METHOD.stages(recipe(batch, **model), TrainingData(train=view, val=None))  # type: ignore[arg-type]
    assert isinstance(stage, ClimbStage)
    return stage


def model_for(stage: ClimbStage) -> Climb:
    torch.manual_seed(1)
    model = METHOD.build(stage.config, ModelFacts(num_classes=stage.classes))
    assert isinstance(model, Climb)
    return model


def batch_of(stage: ClimbStage, step: int = 0, rows: slice = slice(None), epoch: int = 0) -> dict[str, Any]:
    items, first = stage.plan().batch(epoch, step)
    positions = np.arange(len(items)) + first
    return stage.load(PlanPart(items=items[rows], positions=positions[rows], epoch=epoch, seed=1))
