"""Stage 2: from calibration data to a mask, and the baselines."""
