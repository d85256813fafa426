"""Training of the small multimodal model goes on where it was interrupted, to the same weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch


def test_an_interrupted_training_gives_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from reid_dist.generation.tiny import train as module

    recipe = module.Recipe(
        train_worlds=(101,), people=6, images=1, test_worlds=(201,), test_people=3, vision_steps=3, vision_batch=4,
        joint_steps=4, joint_batch=4, read_steps=2, easy_steps=1, save_every=2, evaluate_every=4,
    )  # fmt: skip
    whole = module.train(recipe)
    assert [point["step"] for point in whole.curve] == [4]
    save = module._Phases._save

    def killed(phases: module._Phases) -> None:
        save(phases)
        if phases.done == 5:  # both phases have begun
            raise KeyboardInterrupt

    monkeypatch.setattr(module._Phases, "_save", killed)
    with pytest.raises(KeyboardInterrupt):
        module.train(recipe, None, tmp_path / "checkpoint")
    monkeypatch.setattr(module._Phases, "_save", save)
    continued = module.train(recipe, None, tmp_path / "checkpoint").model.state_dict()
    assert all(torch.equal(value, continued[name]) for name, value in whole.model.state_dict().items())
    with pytest.raises(ValueError, match="another recipe"):
        module.train(module.Recipe(seed=8), None, tmp_path / "checkpoint")
