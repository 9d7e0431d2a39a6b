"""`cada-deploy bench`: how long a model takes here, what it draws, and within which boundary.

measuring  order statistics of runs, and when a warm-up may end
power      clocks, power and energy where NVML, a Jetson's rails or RAPL give them
frames     the images that go through: files, or drawn scenes
host, cuda the two measurements (engine only; image bytes to labels) on a CPU and on a GPU
session    one call: load, warm up, measure, and the result as JSON
words      that JSON as text in the manner of trtexec, and its warnings
"""
