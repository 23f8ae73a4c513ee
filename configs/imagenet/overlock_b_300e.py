_base_ = 'overlock_t_300e.py'

model = dict(
    backbone=dict(arch='b', drop_path_rate=0.5),
    head=dict(in_channels=[576, 720]),
)

test_pipeline = _base_.test_pipeline
test_pipeline[1].scale = 229  # 224 / 0.975
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
