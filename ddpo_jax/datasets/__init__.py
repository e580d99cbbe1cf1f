"""Prepared data sets: comparisons and captioned pictures as tensorflow-datasets in array_record, without TensorFlow.

`ddpo_jax.prepare` writes them; `reading` gives their records by index. Both need: pip install 'ddpo_jax[data]'.
"""
