"""The procedural pedestrian world: the project's built-in data, drawn and never downloaded; no person's photo.

Geometry (identity, body, figure) is separate from shading (palette, camera, render) and from words (captions, oracle);
`write_synthetic` puts a world into an authors' layout.
"""

from reid_dist.data.synthetic.world import World
from reid_dist.data.synthetic.write import plan_synthetic, world_for, write_synthetic

__all__ = ["World", "plan_synthetic", "world_for", "write_synthetic"]
