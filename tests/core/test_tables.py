"""The tables of a bundle: what of them is whose."""

from __future__ import annotations

import numpy as np

from ditc.tables import sampler_columns, sampler_tables


def test_the_samplers_columns_come_back_from_among_the_other_tables() -> None:
    columns = {"t": np.arange(3.0), "sigma": np.zeros(3)}
    tables = {"compensation.k": np.ones((3, 1)), **sampler_tables(columns), "scales.activation": np.ones((3, 2))}
    assert list(sampler_tables(columns)) == ["sampler.t", "sampler.sigma"]
    assert sampler_columns(tables) == columns
