_base_ = '../imagenet/overlock_xt_300e.py'

model = dict(
    backbone=dict(type='OverLoCKVariant', remove=['feature_guidance']),
    head=dict(in_channels=[336, 336]),
)
