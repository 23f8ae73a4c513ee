_base_ = 'overlock_t_300e.py'

model = dict(
    backbone=dict(arch='xt', drop_path_rate=0.1),
    head=dict(in_channels=[336, 420]),
)

test_pipeline = _base_.test_pipeline
test_pipeline[1].scale = 242  # 224 / 0.925
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
