# A config adds optim_wrapper.optimizer.lr and weight_decay.
optim_wrapper = dict(
    type='OptimWrapper',
    # Parameters of equal settings in one group, updated in a few launches
    constructor='GroupedOptimWrapperConstructor',
    optimizer=dict(type='AdamW', betas=(0.9, 0.999), fused=True),
    # Keys are substrings of parameter names.
    paramwise_cfg=dict(
        custom_keys=dict(
            norm=dict(decay_mult=0.0),
            absolute_pos_embed=dict(decay_mult=0.0),
            relative_position_bias_table=dict(decay_mult=0.0),
        )
    ),
)
