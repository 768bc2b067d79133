"""The parts of the hour, in order of worth. A limit is about twice what the part is predicted to take."""

from bench.gpu import build, choice, decoding, methods, sanitizer, smoke, tables
from bench.gpu.part import Part

PARTS = (
    Part(name="build", help="setup.py with the CUDA C++ kernels", limit=120, work=build.work),
    Part(name="smoke", help="every operation against float64", limit=110, work=smoke.work),
    Part(name="exactness", help="errors beside other libraries'", limit=100, work=tables.exactness_work),
    Part(name="ops", help="operations beside rivals and ceilings", limit=150, work=tables.ops_work),
    Part(name="dispatch", help="the faster back end by operator", limit=90, work=choice.work),
    Part(name="heads", help="fused heads beside the bare matmuls", limit=150, work=tables.heads_work),
    Part(name="rollouts", help="decoding beside generate", limit=100, work=decoding.work),
    Part(name="methods", help="PPO against ReMax, beside the plan", limit=170, work=methods.work),
    Part(name="sanitizer", help="compute-sanitizer over tests", limit=150, work=sanitizer.work),
)
