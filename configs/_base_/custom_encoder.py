# The size of your own encoder, by the names of mmmilan.pretrain: ARCH=tiny, small, base or large.
arch, width = {
    'tiny': ('deit-tiny', 192),
    'small': ('deit-small', 384),
    'base': ('base', 768),
    'large': ('large', 1024),
}['{{$ARCH:base}}']
