"""Strict settings for every test: rank promotion raises, four fake devices."""

import jax

jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_numpy_rank_promotion", "raise")
