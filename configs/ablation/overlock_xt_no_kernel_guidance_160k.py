_base_ = '../upernet/overlock_xt_160k.py'

model = dict(backbone=dict(type='OverLoCKVariant', remove=['kernel_guidance']))
