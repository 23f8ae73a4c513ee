train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=300, val_interval=1)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')

param_scheduler = [
    # From 1e-6 to the learning rate of the configs, 2e-3.
    dict(
        type='LinearLR',
        start_factor=5e-4,
        begin=0,
        end=5,
        by_epoch=True,
        convert_to_iter_based=True,
    ),
    dict(
        type='CosineAnnealingLR',
        eta_min=1e-5,
        begin=5,
        end=300,
        by_epoch=True,
        convert_to_iter_based=True,
    ),
]

# The learning rates of the configs are for 8 GPUs with 256 images each.
auto_scale_lr = dict(enable=False, base_batch_size=2048)
