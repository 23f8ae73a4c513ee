_base_ = '../imagenet/overlock_xt_300e.py'

model = dict(
    backbone=dict(
        type='OverLoCKVariant', mixer=dict(type='contmix', kernel_size=7)
    )
)
