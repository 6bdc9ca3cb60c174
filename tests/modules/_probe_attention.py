import os, time, torch
import torch.nn.functional as F
from torch.nn.attention import sdpa_kernel, SDPBackend as SB
from overdrive.functional import attention as A
from overdrive.functional.attention_mask import MASK_KINDS
from overdrive.modules.attention import DotProductAttention
print(torch.__version__, torch.backends.cudnn.version(), torch._C._get_sdp_priority_order())
def kern(fn, n=20):
    for _ in range(5): fn()
    torch.cuda.synchronize(); a,b=torch.cuda.Event(enable_timing=True),torch.cuda.Event(enable_timing=True)
    a.record(); [fn() for _ in range(n)]; b.record(); torch.cuda.synchronize(); return a.elapsed_time(b)/n
def host(fn, n=500):
    for _ in range(50): fn()
    torch.cuda.synchronize(); s=time.perf_counter()
    for _ in range(n): fn()
    e=time.perf_counter(); torch.cuda.synchronize(); return (e-s)/n*1e6
# 1 dropout of cudnn
for p in (.1,.125,.25,.5,.05,.2,.3):
    q=torch.zeros(4,8,256,64,dtype=torch.bfloat16,device="cuda"); v=torch.ones_like(q)
    v=torch.eye(64,dtype=torch.bfloat16,device="cuda").repeat(4,1)[None,None].expand(4,8,256,64).contiguous()
    r={}
    for name,b in (("cudnn",SB.CUDNN_ATTENTION),("flash",SB.FLASH_ATTENTION)):
        try:
            with sdpa_kernel(b): o=F.scaled_dot_product_attention(q,q,v,dropout_p=p)
            # each output element sums 4 of 256 kept probabilities, each 1/256/(1-p)
            r[name]=(1-(o.float()*64).mean().item()*(1-p))
        except RuntimeError as e: r[name]=str(e)[:60]
    print("dropout",p,r)
# 2 host
q,k,v=(torch.randn(2,8,128,64,dtype=torch.bfloat16,device="cuda",requires_grad=True) for _ in range(3))
print("host sdpa", host(lambda:F.scaled_dot_product_attention(q,k,v,is_causal=True)))
def ctx():
    with sdpa_kernel([SB.CUDNN_ATTENTION,SB.MATH],set_priority=True): return F.scaled_dot_product_attention(q,k,v,is_causal=True)
print("host ctx", host(ctx)); print("host attention", host(lambda:A.attention(q,k,v,None,True)))
print("host cudnn aten", host(lambda:torch.ops.aten._scaled_dot_product_cudnn_attention(q,k,v,None,True,0.0,True,False,scale=None)))
# 3 copies
from torch.profiler import profile, ProfilerActivity
for layout in ("sbhd","bshd"):
  for mt in ("causal","padding"):
    lead=(2048,4) if layout=="sbhd" else (4,2048)
    w=torch.randn(*lead,3*4096,dtype=torch.bfloat16,device="cuda",requires_grad=True)
    m=DotProductAttention(32,128,qkv_format=layout,attn_mask_type=mt)
    mask=(torch.arange(2048,device="cuda")>=torch.tensor([2048,2000,1500,1000],device="cuda")[:,None])[:,None,None] if mt=="padding" else None
    def f():
        out=m(*A.split_qkv(w,32,32,128,False),mask); return out
    g=torch.randn(*lead,4096,dtype=torch.bfloat16,device="cuda")
    def fb(): f().backward(g)
    print(layout,mt,"fwd",kern(f),"fwd+bwd",kern(fb))
    with profile(activities=[ProfilerActivity.CUDA]) as prof: fb(); torch.cuda.synchronize()
    for e in prof.key_averages(): print("   ",e.key[:90],e.count,round(e.device_time_total))
# 4 masks and dropout per backend
q,k,v=(torch.randn(4,2048,32,128,dtype=torch.bfloat16,device="cuda",requires_grad=True).transpose(1,2) for _ in range(3))
kk,vv=k[:,:8],v[:,:8]; g=torch.randn_like(q)
mask=(torch.arange(2048,device="cuda")>=torch.tensor([2048,2000,1500,1000],device="cuda")[:,None])[:,None,None]; full=torch.rand(4,1,2048,2048,device="cuda")<.5
for name in ("cudnn","flash","efficient"):
    os.environ["OVERDRIVE_ATTENTION"]=name
    for what,kw in (("none",{}),("causal",{"causal":True}),("padmask",{"mask":~mask}),("fullmask",{"mask":full}),("causal drop .1",{"causal":True,"dropout":.1}),("causal drop .125",{"causal":True,"dropout":.125}),("padmask drop .125",{"mask":~mask,"dropout":.125}),("gqa",{"causal":True,"kv":(kk,vv)}),("gqa padmask",{"mask":~mask,"kv":(kk,vv)})):
        kv=kw.pop("kv",(k,v))
        try: print(name,what,"fwd",round(kern(lambda:A.attention(q,*kv,**kw)),3),"fwd+bwd",round(kern(lambda:torch.autograd.grad(A.attention(q,*kv,**kw),(q,*kv),g)),3))
        except Exception as e: print(name,what,type(e).__name__,str(e)[:150])
os.environ.pop("OVERDRIVE_ATTENTION")
print(DotProductAttention(32,128,qkv_format="bshd").explain(*(x.transpose(1,2) for x in (q,k,v))))
print(DotProductAttention(32,128,attention_dropout=.1,attn_mask_type="padding",qkv_format="bshd").explain(*(x.transpose(1,2) for x in (q,k,v)),mask))
