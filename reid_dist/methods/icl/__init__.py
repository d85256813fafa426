"""ICL and RDE: text-to-image person re-identification with divided pairs and reorganised captions (see README.md)."""

from dataclasses import replace

from reid_dist.methods.icl.figures import selected_tokens
from reid_dist.methods.icl.method import METHOD as _METHOD
from reid_dist.methods.icl.record import division_figures

METHOD = replace(_METHOD, figures=(selected_tokens,), training_figures=division_figures)

__all__ = ["METHOD"]
