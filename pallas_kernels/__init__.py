"""Kernels for hybrid attention, mixture of experts and large vocabularies.

Each folder is one operation: `api.py` is its one public function, `reference.py` its plain meaning, the other modules
its implementations. Nothing here knows of any model.
"""
