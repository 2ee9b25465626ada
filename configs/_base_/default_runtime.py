default_scope = 'mmpretrain'

default_hooks = dict(
    runtime_info=dict(type='mmmilan.DeferredRuntimeInfoHook'),
    timer=dict(type='IterTimerHook'),
    logger=dict(type='mmmilan.MainLoggerHook', interval=100),
    param_scheduler=dict(type='ParamSchedulerHook'),
    checkpoint=dict(type='mmmilan.CheckpointHook', interval=1, max_keep_ckpts=3, asynchronous=True),
    sampler_seed=dict(type='DistSamplerSeedHook'),
    compile=dict(type='mmmilan.CompileHook'),  # on a GPU
    prefetch=dict(type='mmmilan.PrefetchHook'),
)
custom_hooks = [
    dict(type='mmmilan.StepSeedHook'),
    dict(type='mmmilan.NonFiniteLossHook'),
    dict(type='mmmilan.CorruptImageHook'),
    dict(type='mmmilan.ThroughputHook'),
    dict(type='mmmilan.ScheduleCheckHook'),
    # Every run has these and CorruptImageHook, also of a config that does not name them (docs/architecture.md).
    dict(type='mmmilan.ExactLoadingHook'),
    dict(type='mmmilan.ImageSizeHook'),
    dict(type='mmmilan.ClassCountHook'),
    dict(type='mmmilan.StopHook'),
    dict(type='mmmilan.HeartbeatHook', silent=60.0, stuck=540.0),  # seconds
]

env_cfg = dict(
    cudnn_benchmark=True,
    mp_cfg=dict(mp_start_method='fork', opencv_num_threads=0),
    dist_cfg=dict(backend='nccl'),
)
visualizer = dict(
    type='Visualizer',
    vis_backends=[dict(type='LocalVisBackend'), dict(type='TensorboardVisBackend')],
)
randomness = dict(seed=0)
log_level = 'INFO'
load_from = None
resume = False
