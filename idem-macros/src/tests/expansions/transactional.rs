async fn pay(
    __a0: Tx<Pg>,
    __idem: ::idem_runtime::__private::Idem<
        String,
        ::idem_runtime::__private::EngineInRouterState,
    >,
) -> ::idem_runtime::__private::Guarded<Result<String, Problem>> {
    let __policy: &'static ::idem_runtime::__private::Policy = {
        const __IDEM_POLICY: ::idem_runtime::__private::Policy = ::idem_runtime::__private::Policy::new(
                ::idem_runtime::__private::Anchor::header("Idempotency-Key"),
            )
            .transaction();
        &__IDEM_POLICY
    };
    {
        #[allow(unused_imports)]
        use ::idem_runtime::__private::probe::Fallback as _;
        ::idem_runtime::__private::probe::Of::<
            Result<String, Problem>,
        >::idem_answer_is_complete();
    }
    {
        #[allow(unused_imports)]
        use ::idem_runtime::__private::transaction::Fallback as _;
        const _: () = ::idem_runtime::__private::transaction::one(
            0 + ::idem_runtime::__private::transaction::Of::<Tx<Pg>>::COUNT
                + ::idem_runtime::__private::transaction::Of::<String>::COUNT,
        );
    }
    ::idem_runtime::__private::run(
            __idem,
            __policy,
            move |__last: String| ::idem_runtime::__private::boxed(async move {
                #[allow(
                    unreachable_code,
                    clippy::diverging_sub_expression,
                    clippy::empty_loop,
                    clippy::let_unit_value,
                    clippy::let_with_type_underscore,
                    clippy::needless_return,
                )]
                if false {
                    let __never: Result<String, Problem> = loop {};
                    return __never;
                }
                let __args = (__a0, __last);
                let mut tx = __args.0;
                let body = __args.1;
                #[allow(unused_braces)] { Ok(body) }
            }),
        )
        .await
}
