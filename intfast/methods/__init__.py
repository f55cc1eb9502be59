"""The methods beside InT, one file each: what they add to data, credit or objective."""
