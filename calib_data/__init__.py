"""Which points of which trajectories calibrate: pools, TAP and the other selectors, the calibration set."""
