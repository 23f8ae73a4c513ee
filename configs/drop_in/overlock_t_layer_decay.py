_base_ = '../mask_rcnn/overlock_t_3x.py'

# Each of the 30 blocks learns at 0.98 times the rate of the next; the stem at
# 0.98^31 = 0.53 times that of neck and heads.
optim_wrapper = dict(
    constructor='LayerDecayOptimWrapperConstructor',
    paramwise_cfg=dict(layer_decay_rate=0.98),
)
