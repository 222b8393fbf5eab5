"""What a device can do: named devices as data, and the measured calibration of this one."""
