"""What a calibration will cost in time, memory and disk, said beforehand."""
