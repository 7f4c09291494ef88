"""Points of trajectories that calibrate: pools, TAP and the other selectors, the calibration set."""
