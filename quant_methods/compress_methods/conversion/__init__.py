"""The offline conversion: recipe, plan, calibration, shards, verification, report."""
