"""A Qwen2-VL of 1.7 million parameters that sees the synthetic pedestrians: made here, weights in `weights/`.

It answers short questions only (one attribute, does the picture match, where is a part), so that vLLM, RDA, THI and
grounding run end to end on a CPU with answers that depend on the picture. It knows nothing but this world.

The committed weights come from an earlier, shorter recipe than `train.Recipe` of today; `weights/recipe.json` holds that one
and what it reached: attributes from .16 (type of the upper garment) to .93, match questions at chance. Today's recipe has been
run in part only.
"""
