"""Measurements. Nothing here is asserted: times are noisy, ratios within one run are not."""
