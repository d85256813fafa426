"""A Qwen2-VL of 1.8 million parameters that sees the synthetic pedestrians: made here, weights in `weights/`.

It answers short questions only (one attribute, does the picture match, where is a part), so that vLLM, RDA, THI and
grounding run end to end on a CPU with answers that depend on the picture. It knows nothing but this world.

`weights/recipe.json` holds what made the committed weights and what they reached on people never seen: attributes from .16 (type
of the upper garment) to .97, half of them above .84; match questions at chance.
"""
