"""Checkpoints: Hugging Face files and the native form, read strictly, converted exactly, verified bit by bit.

The rooms: `names` (HF tensor <-> parameter), `safetensors` and `directory` (strict readers), `native` (TensorStore arrays that
Orbax restores), `convert` (from_hf, to_hf, save_hf, save_native), `verify`, `load` (read_params). Import them by name: this
package itself imports nothing, so that `import exaone_jax` stays quick.
"""
