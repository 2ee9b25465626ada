# The size of your own encoder, by the names of mmmilan.pretrain: ARCH=tiny, small, base or large.
arch, width, depth = {
    'tiny': ('deit-tiny', 192, 12),
    'small': ('deit-small', 384, 12),
    'base': ('base', 768, 12),
    'large': ('large', 1024, 24),
}['{{$ARCH:base}}']
