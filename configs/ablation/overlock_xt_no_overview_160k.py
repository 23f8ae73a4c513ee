_base_ = '../upernet/overlock_xt_160k.py'

model = dict(
    backbone=dict(type='OverLoCKVariant', remove=['overview']),
    decode_head=dict(in_channels=[56, 112, 256, 336]),
    auxiliary_head=dict(in_channels=256),
)
