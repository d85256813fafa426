"""CLIMB-ReID's network (methods/climb.md section 2).

    image -> CLIP's image tower -> tokens Z, projected tokens Z P
    feat = [neck(Z_cls), neck(Z_cls P)] -> classifier          head(stop-gradient of Z) -> neck -> head classifier

Because the head reads Z without gradient, its losses train the head alone; the tower learns from the memory loss and
a quarter of the identity loss. `forward` ends before the necks: batch norm needs the global batch, so the necks are
run on gathered rows inside the losses, which keeps the forward pass row-wise (micro-batches, uneven slices) and the
statistics exact for any number of workers.

Shapes: n rows, T frames, W tower width (768), D projected width (512), C classes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from reid_dist.methods.climb.config import Config
from reid_dist.methods.climb.head import MultiTemporalHead, ReorderMambaHead
from reid_dist.methods.spec import Outputs
from reid_dist.models.clip import ClipArchitecture, ImageTower, TowerOutput, architecture


def arch_of(config: Config) -> ClipArchitecture:
    """The tower's sizes that a config asks for."""
    return architecture(config.arch, image_size=config.image_size, stride=config.stride)


class CameraEmbedding(nn.Module):
    """A vector per camera, added to the class token ("side information embedding", SIE)."""

    def __init__(self, cameras: int, width: int, weight: float) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.empty(cameras, width))
        nn.init.trunc_normal_(self.table, std=0.02)
        self.weight = weight

    def forward(self, camera: Tensor) -> Tensor:
        """int64 [n] -> [n, W]."""
        return self.weight * self.table[camera]


def neck(width: int) -> nn.BatchNorm1d:
    """Batch norm with a frozen zero bias. Torch's own: it always sees the gathered batch (module docstring)."""
    made = nn.BatchNorm1d(width)
    made.bias.requires_grad_(False)
    return made


class Climb(nn.Module):
    """Image tower, camera embedding, Mamba head, necks, classifiers."""

    def __init__(self, config: Config, arch: ClipArchitecture, num_classes: int) -> None:
        super().__init__()
        width, joint = arch.image_width, arch.joint_width
        self.tower = ImageTower(arch)
        self.tower.embed.patches.weight.requires_grad_(False)  # the patch convolution is the only frozen part
        self.camera = CameraEmbedding(config.cameras, width, config.camera_weight) if config.cameras else None
        self.head: nn.Module = (
            MultiTemporalHead(width, config.temporal_strides, config.states, config.step_rank)
            if config.frames
            else ReorderMambaHead(width, config.states, config.step_rank)
        )
        self.neck = neck(width)
        self.neck_projected = neck(joint)
        self.neck_head = neck(width)
        self.classifier = nn.Linear(width + joint, num_classes, bias=False)
        self.classifier_head = nn.Linear(width, num_classes, bias=False)
        for classifier in (self.classifier, self.classifier_head):
            if num_classes:
                nn.init.normal_(classifier.weight, std=0.001)

    def tokens(self, image: Tensor, camera: Tensor | None) -> TowerOutput:
        """image [n, 3, h, w], camera int64 [n] or None; its vector joins the class token before the first norm."""
        embedded = self.tower.embed(image)
        if self.camera is not None and camera is not None:
            token = embedded[:, :1] + self.camera(camera)[:, None].to(embedded.dtype)
            embedded = torch.cat([token, embedded[:, 1:]], dim=1)
        return self.tower.finish(embedded)

    def forward(self, image: Tensor, camera: Tensor | None = None, with_head: bool = True) -> Outputs:
        """image [n, 3, h, w] or clips [n, T, 3, h, w] -> {"token" [n, W], "projected" [n, D], "head" [n, W]}, no necks.

        Class tokens of a clip are averaged over its frames. Without the head for the memory's rebuilding.
        """
        clip = image.dim() == 5
        rows = image.shape[:2] if clip else image.shape[:1]
        if clip and camera is not None:
            camera = camera.repeat_interleave(image.shape[1])
        seen = self.tokens(image.flatten(0, 1) if clip else image, camera)
        tokens = seen.tokens.reshape(*rows, *seen.tokens.shape[1:])
        classes, projected = tokens[..., 0, :], seen.projected[:, 0].reshape(*rows, seen.projected.shape[-1])
        out = {"token": classes.mean(1) if clip else classes, "projected": projected.mean(1) if clip else projected}
        if with_head:
            fixed = tokens.detach()
            out["head"] = self.head(fixed) if clip else self.head(fixed[:, 0], fixed[:, 1:])
        return {name: value.float() if value.dtype != torch.float64 else value for name, value in out.items()}

    def features(self, out: Outputs) -> tuple[Tensor, Tensor | None]:
        """(main descriptor [n, W + D], head descriptor [n, W] or None): the necks on outputs of `forward`."""
        main = torch.cat([self.neck(out["token"]), self.neck_projected(out["projected"])], dim=1)
        return main, self.neck_head(out["head"]) if "head" in out else None

    def encode(self, image: Tensor, camera: Tensor | None = None) -> Tensor:
        """Test descriptor [n, W + D + W], not yet normalised. Evaluation mode."""
        main, head = self.features(self(image, camera))
        assert head is not None
        return torch.cat([main, head], dim=1)
