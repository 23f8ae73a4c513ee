_base_ = '../mask_rcnn/overlock_b_1x.py'

runner_type = 'FlexibleRunner'
strategy = dict(
    type='ResumableFSDPStrategy',
    model_wrapper=dict(auto_wrap_policy='overlock_wrap_policy'),
    state_dict_cfg='full',  # checkpoints like those of other runners
)
# With it, this runner notes a wrong epoch in checkpoints.
default_hooks = dict(checkpoint=dict(save_best=None))
# This strategy leaves sync_bn alone.
model = dict(backbone=dict(norm_cfg=dict(type='SyncBN')))
