"""A Qwen2-VL of 1.7 million parameters that sees the synthetic pedestrians: made here, weights in `weights/`.

It answers short questions only (one attribute, does the picture match, where is a part), so that vLLM, RDA, THI and
grounding run end to end on a CPU with answers that depend on the picture. It knows nothing but this world.
"""
