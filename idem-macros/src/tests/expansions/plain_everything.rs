async fn run<T>(
    self: Arc<Self>,
    job: Job<T>,
    __a1: Permit,
    r#type: &'static str,
) -> Result<u64, Failed>
where
    T: Clone,
    T: 'static,
{
    let __function: &'static foo::bar::__private::Function = &const {
        foo::bar::__private::Function::new(
            ::core::concat!(::core::module_path!(), "::", "run"),
            "run",
            foo::bar::__private::Policy::new(
                    foo::bar::__private::Anchor::all(
                        &[
                            foo::bar::__private::Anchor::argument(),
                            foo::bar::__private::Anchor::argument(),
                        ],
                    ),
                )
                .forever()
                .scope(foo::bar::__private::Scope::argument())
                .space(Self::SPACE)
                .in_flight(
                    foo::bar::__private::InFlight::Wait(
                        ::core::time::Duration::from_millis(5000),
                    ),
                )
                .on_unknown(foo::bar::__private::OnUnknown::Refuse)
                .lease(LEASE)
                .mode(foo::bar::__private::Mode::Observe)
                .store_outage(foo::bar::__private::StoreOutage::Open),
        )
    };
    let __call = {
        #[allow(unused_variables)]
        let __collect = || {
            let job = &job;
            let _ = &__a1;
            let r#type = &r#type;
            let mut __call = foo::bar::__private::FunctionCall::new(
                foo::bar::__private::engine(&(self.idem)),
                __function,
            );
            __call.push(&(event));
            __call.push(&(job.phase as u8));
            __call.push(&(job.tenant));
            __call.compare("job.amount", &(job.amount));
            __call.compare("&job.to", &(&job.to));
            __call
        };
        __collect()
    };
    foo::bar::__private::call::<
        Result<u64, Failed>,
        _,
    >(
            __call,
            Failed::is_refusal,
            move |__engine, __operation| foo::bar::__private::boxed(async move {
                #[allow(
                    unreachable_code,
                    clippy::diverging_sub_expression,
                    clippy::empty_loop,
                    clippy::let_unit_value,
                    clippy::let_with_type_underscore,
                    clippy::needless_return,
                )]
                if false {
                    let __never: Result<u64, Failed> = loop {};
                    return __never;
                }
                let _ = &self;
                let __args = (job, __a1, r#type);
                let op: foo::bar::__private::Operation = __operation;
                #[allow(unused_mut)]
                let mut job = __args.0;
                let r#type = __args.2;
                let _ = &job;
                #[allow(unused_braces)]
                {
                    op.id();
                    Ok(1)
                }
            }),
        )
        .await
}
