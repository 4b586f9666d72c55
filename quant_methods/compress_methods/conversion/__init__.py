"""The offline conversion: recipe, plan, calibration, units, verification, report."""
