_base_ = '../imagenet/overlock_xt_300e.py'

model = dict(
    backbone=dict(
        type='OverLoCKVariant', mixer=dict(type='contmix', num_regions=5)
    )
)
